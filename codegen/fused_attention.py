"""Attention: q, k and v made where they are used in decoding; elsewhere tiles of queries over the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from llmopt.codegen.emit import key_hook, query_hook
from llmopt.codegen.fused_region import (
    Argument,
    FusedRegion,
    call_of,
    config_of,
    dtype_of,
    passed,
    template_of,
    type_of,
)
from llmopt.codegen.kernel import FRESH, PAGED, Buffer, Call, Scalar
from llmopt.codegen.printer import Operands
from llmopt.compiler.emittable import argument, attention_shape, keeps_order, near_of, packings_of, puts_tokens_first
from llmopt.compiler.errors import EmitError
from llmopt.compiler.quant.kv import Packing

# lengths of prompts are rounded up to multiples of this for torch's attention: cuDNN, which it calls on an sm_90,
# plans anew for each length, for tens of milliseconds
TORCH_TOKENS = 256
_HOOKS = {"LOAD_Q": query_hook, "LOAD_K": key_hook, "LOAD_V": key_hook}


def _common(region: FusedRegion, attend: fx.Node) -> tuple[list[Argument], Argument, Argument, dict[str, Scalar]]:
    """What both templates of attention take: pages and tables, sinks, the result, constants."""
    k_write, v_write, tables = attend.args[1:4]
    paged: list[Argument] = [
        ("k_pages", type_of(k_write), region.argument(k_write.args[0])),  # type: ignore[arg-type, union-attr]
        ("v_pages", type_of(v_write), region.argument(v_write.args[0])),  # type: ignore[arg-type, union-attr]
        ("tables", "*i64", region.argument(tables)),  # type: ignore[arg-type]
    ]
    sinks, scale, window, softcap = (argument(attend, name, None) for name in ("sinks", "scale", "window", "softcap"))
    sunk: Argument = ("sinks", None, None)
    if isinstance(sinks, fx.Node):
        sunk = ("sinks", type_of(sinks), region.argument(sinks))
    constants: dict[str, Scalar] = {"SCALE": float(scale), "WINDOW": int(window), "SOFTCAP": float(softcap)}
    return (
        paged,
        sunk,
        ("out", type_of(attend), f"out{_place_of(region, attend)}"),
        {**attention_shape(attend), **constants},
    )


def _place_of(region: FusedRegion, attend: fx.Node) -> int:
    """Which output the attention's result is, token by token. Raises EmitError."""
    result = region.result()
    *behind, turned = _chain(result, attend) or [result]
    if not puts_tokens_first(turned) or not all(map(keeps_order, behind)):
        raise EmitError(f"{attend.name} is returned as {list(result.meta['val'].shape)}; wanted it token by token")
    return region.graph.outputs().index(result)


def _chain(last: fx.Node, first: fx.Node) -> list[fx.Node]:
    found = []
    while last is not first:
        found.append(last)
        last = last.args[0]  # type: ignore[assignment]
    return found


def attention(region: FusedRegion, tokens: int) -> None:
    """One kernel; where it cannot make q, k and v itself (they take too many tensors), kernels over rows ahead do, and
    there is a note of it."""
    attend = region.attend()
    made = attend.args[0], attend.args[1].args[1], attend.args[2].args[1]  # type: ignore[union-attr]
    try:
        call = _kernel(region, attend, made, tokens)  # type: ignore[arg-type]
    except EmitError as error:
        region.notes.append(f"q, k and v are made by kernels over rows: {error}")
        del region.temporaries[:]
        call = _kernel(region, attend, _stored_by_token(region, made), tokens)  # type: ignore[arg-type]
    region.calls.append(call)


def _stored_by_token(region: FusedRegion, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes [1, H, N, D] again, as views of temporaries [1, N, H, D]."""
    places: dict[fx.Node, str] = {}
    views = []
    for node in nodes:
        with region.graph.fx.inserting_after(node):
            turned = region.graph.fx.call_function(torch.ops.aten.transpose.int, (node, 1, 2))
        turned.meta["val"] = node.meta["val"].transpose(1, 2)
        places[turned] = region.temporary(region.buffer(turned))
        with region.graph.fx.inserting_after(turned):
            views.append(region.graph.fx.call_function(torch.ops.aten.transpose.int, (turned, 1, 2)))
        views[-1].meta["val"] = node.meta["val"]
    region.rows(places, "N")
    region.stored.update(places)
    return views


def _kernel(region: FusedRegion, attend: fx.Node, made: Sequence[fx.Node], tokens: int) -> Call:
    """`made`: q, and the token's own k and v."""
    paged, sinks, out, constants = _common(region, attend)
    operands = Operands()
    hooks = {k: hook(operands, n, region.stored) for (k, hook), n in zip(_HOOKS.items(), made, strict=True)}
    heads = attention_shape(attend)
    packed = _packed(attend)
    template = "decode_packed:decode_packed" if packed else "decode_attention:decode_attention"
    bits = {"INT4": int(packed["K_KIND"] == packed["V_KIND"] == "int4")} if packed else {}
    config = config_of(region, template, {**heads, "N": tokens, **bits}, dtype_of(attend))
    arguments: list[Argument] = [
        *paged,
        ("positions", "*i64", region.argument(attend.args[5])),  # type: ignore[arg-type]
        ("slots", "*i64", region.argument(attend.args[1].args[2])),  # type: ignore[arg-type, union-attr]
        sinks,
        out,
        ("partial", "*fp32", region.temporary(Buffer((f"N * SPLITS * {heads['HQ'] * heads['DV']}",), "float32"))),
        ("lse", "*fp32", region.temporary(Buffer((f"N * SPLITS * {heads['HQ'] * 2}",), "float32"))),
        ("tickets", "*i32", region.temporary(Buffer((f"N * {heads['HKV']}",), "int32", kept=True))),
        *passed(region, operands),
        *((name, "i32", name) for name in ("N", "M", "SPLITS")),
    ]
    more: dict[str, Scalar] = {"ORDER": region.ordered.get(str(out[2]), 0), "PDL": region.pdl}
    return call_of(template, heads, config, arguments, {**constants, **packed, **more}, hooks)


def _packed(attend: fx.Node) -> dict[str, Scalar]:
    """The constants that say how keys and values are packed, and who is near; none if they are not."""
    found: dict[str, Scalar] = {}
    for letter, packing in zip("KV", packings_of(attend), strict=True):
        if packing:
            how = Packing.parse(packing)
            found |= {f"{letter}_KIND": how.kind, f"{letter}_ORDER": how.order}
    if any(near_of(attend)):
        found |= dict(zip(("FIRST", "RECENT"), near_of(attend), strict=True))
    return found


def many_attention(region: FusedRegion) -> None:
    """q made and k and v stored by kernels over rows, then attention over tiles of queries; of whole prompts torch's,
    over keys and values that were left token by token, too."""
    attend = region.attend()
    if any(near_of(attend)):
        _many_near(region, attend)
        return
    q, writes = attend.args[0], attend.args[1:3]
    paged, sinks, out, constants = _common(region, attend)
    heads = attention_shape(attend)
    template, packed = "prefill_attention:prefill_attention", _packed(attend)
    config = config_of(region, template, {**heads, "PACKED": int(bool(packed))}, dtype_of(attend))
    given = constants["WINDOW"], constants["SOFTCAP"], sinks[1] is not None
    apart = template_of(template).torch_attends(heads, dtype_of(attend), region.target, *given)
    left = [q] if apart else [q, *(n.args[1] for n in writes)]  # type: ignore[union-attr]
    # torch's attention may read past the last token
    made = {n: region.temporary(region.buffer(n, _by_token(n, 0 if apart else TORCH_TOKENS - 1))) for n in left}  # type: ignore[arg-type]
    if packed:
        _write(region, attend, made)  # type: ignore[arg-type]
    else:
        pages = {n: region.argument(n.args[0]) for n in writes}  # type: ignore[union-attr, arg-type]
        region.rows({**made, **pages}, "N", by_token=tuple(left))  # type: ignore[dict-item, arg-type]
    if apart is None:
        scale = ("scale", constants["SCALE"]), ("multiple", TORCH_TOKENS)
        region.calls.append(Call((*made.values(), "layout", out[2]), op="attend", constants=scale, when=FRESH))
    arguments: list[Argument] = [
        ("q", type_of(q), made[q]),  # type: ignore[arg-type, index]
        *paged,
        ("tiles", "*i32", "tiles"),
        sinks,
        out,
        ("M", "i32", "M"),
    ]
    packed.pop("K_ORDER", None)
    plain: dict[str, Scalar] = {"K_KIND": "", "V_KIND": "", "V_ORDER": 1}
    tiled = call_of(template, heads, config, arguments, {**constants, **plain, **packed}, {})
    region.calls.append(tiled if apart else replace(tiled, when=PAGED))


def _many_near(region: FusedRegion, attend: fx.Node) -> None:
    """q, k and v by kernels over rows, then torch's ops, one after the other."""
    write, *_ = writes = attend.args[1:3]
    given: list[fx.Node] = [attend.args[0], *(n.args[1] for n in writes)]  # type: ignore[union-attr, list-item]
    made = {n: region.temporary(region.buffer(n, _by_token(n, 0))) for n in given}
    region.rows(made, "N", by_token=tuple(given))  # type: ignore[arg-type]
    pages = [region.argument(n.args[0]) for n in writes]  # type: ignore[union-attr, arg-type]
    ahead = [region.argument(n) for n in (*attend.args[3:6], write.args[2])]  # type: ignore[union-attr, arg-type]
    sunk = argument(attend, "sinks", None)
    sinks = None if sunk is None else region.argument(sunk)
    out = f"out{_place_of(region, attend)}"
    names = ("scale", "window", "softcap", "k_packing", "v_packing", "first", "recent")
    args = (*(made[n] for n in given), *pages, *ahead, sinks, out)
    settings = tuple((name, argument(attend, name, None)) for name in names)
    region.calls.append(Call(args, op="attend_near", constants=settings))
    region.notes.append("torch attends to prompts, unpacking what they see, since some tokens are seen as they are")


def _write(region: FusedRegion, attend: fx.Node, made: Mapping[fx.Node, str]) -> None:
    """q, k and v computed, rotated and rounded in one kernel, or in one that reads what kernels over rows computed."""
    nodes = [attend.args[0], *(n.args[1] for n in attend.args[1:3])]  # type: ignore[union-attr]
    try:
        call = _writing(region, attend, nodes, nodes, made)  # type: ignore[arg-type]
    except EmitError as error:
        region.notes.append(f"q, k and v are made by kernels over rows: {error}")
        call = _writing(region, attend, nodes, _stored_by_token(region, nodes), made)  # type: ignore[arg-type]
    region.calls.append(call)


def _writing(
    region: FusedRegion,
    attend: fx.Node,
    nodes: Sequence[fx.Node],
    given: Sequence[fx.Node],
    made: Mapping[fx.Node, str],
) -> Call:
    operands, heads, template = Operands(), attention_shape(attend), "write_packed:write_packed"
    hooks = {k: hook(operands, n, region.stored) for (k, hook), n in zip(_HOOKS.items(), given, strict=True)}
    config = config_of(region, template, heads, dtype_of(attend))
    arguments: list[Argument] = [
        (f"{letter}_out", type_of(n) if n in made else None, made.get(n))
        for letter, n in zip("qkv", nodes, strict=True)
    ]
    writes: list[fx.Node] = list(attend.args[1:3])  # type: ignore[arg-type]
    arguments += [
        (f"{letter}_pages", type_of(n), region.argument(n.args[0]))  # type: ignore[arg-type]
        for letter, n in zip("kv", writes, strict=True)
    ]
    arguments += [("slots", "*i64", region.argument(writes[0].args[2])), *passed(region, operands)]  # type: ignore[arg-type]
    constants: dict[str, Scalar] = {**heads, **_packed(attend), "PDL": region.pdl}
    return call_of(template, heads, config, arguments, constants, hooks)


def _by_token(node: fx.Node, more: int) -> tuple[int | str, ...]:
    """[1, H, N, D] as [N, H, D], with rows to spare."""
    _, heads, _, channels = node.meta["val"].shape
    return (f"N + {more}" if more else "N", heads, channels)
