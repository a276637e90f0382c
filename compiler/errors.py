"""Every error llmopt raises on purpose: one class per kind of mistake.

A message says, in one line, what went wrong, where, what was seen, what was wanted, and the remedy. The CLI
prints the message and exits with code 2; anything that is not an `LlmoptError` is a bug in llmopt and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlmoptError(Exception):
    """Base of every deliberate error."""


class CaptureError(LlmoptError):
    """The model could not be turned into a graph."""


class InputError(LlmoptError):
    """A prompt, token id, path or option given by the caller is unusable."""


class RaiseError(LlmoptError):
    """A node of the captured graph could not be expressed in the dialect."""


class VerifyError(LlmoptError):
    """A graph broke an invariant of the dialect."""


class PassMatchedNothing(LlmoptError):
    """A pass named in the recipe rewrote nothing; the message carries the nearest miss."""


class PassOrderError(LlmoptError):
    """A pass stands in the recipe before the pass that ensures what it requires."""


class RecipeError(LlmoptError):
    """A recipe is unknown, malformed, or names an unknown pass or option."""


class TargetError(LlmoptError):
    """A target is unknown, or an artifact was built for another one."""


class KnobError(LlmoptError):
    """An LLMOPT_* environment variable, or a knob set from Python, is unusable."""


class ProviderError(LlmoptError):
    """No allowed implementation of an op fits the target and the arguments."""


class RewriteError(LlmoptError):
    """A rule broke its contract while rewriting (the graph is left as it was)."""


class NumericsError(LlmoptError):
    """A program computed inf or nan where a number was wanted."""


class BuildError(LlmoptError):
    """Native code could not be built or loaded on this machine."""


class EmitError(LlmoptError):
    """Nodes cannot be printed as a kernel; the caller runs them another way."""


class ArtifactError(LlmoptError):
    """An artifact cannot be written where it was asked for, or what was read is damaged, too new, or none."""


class CacheError(LlmoptError):
    """A page or sequence of the KV cache was used by someone who does not own it."""


class CacheFullError(LlmoptError):
    """The KV cache has no page left and may not grow."""


class DeviceError(LlmoptError):
    """A GPU or its driver refused to load or run a kernel."""


class DeviceMemoryError(LlmoptError):
    """A GPU has too little memory for weights, cache or work space."""


def did_you_mean(seen: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt name: `did you mean 'x'? Known: a, b, c.`"""
    names = sorted(known)
    close = difflib.get_close_matches(seen, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) or 'none'}."
