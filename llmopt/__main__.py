"""`python -m llmopt`."""

from llmopt.cli import main

main()
