"""The modules that hooks' sources become."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from llmopt.codegen import hooks
from llmopt.codegen.kernel import Kernel
from llmopt.compiler import knobs


def test_threads_see_no_module_that_is_half_executed(tmp_path):
    """The hook is defined a while after the module's beginning, and all ask for it at once."""
    source = "import time\n\ntime.sleep(0.3)\n\n\ndef hook(x):\n    return x + 7\n"
    kernel = Kernel("toy:toy", (), (), (("HOOK", "hook"),), source)
    start = Barrier(4)

    def ask(_):
        start.wait()
        return hooks.constants(kernel)["HOOK"]

    with knobs.scope(cache=tmp_path), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(set(found)) == 1
    assert found[0](1) == 8
