"""The default form: every module keeps its name, so that any loader can fuse and slice it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from awqconv.checkpoint.header import TensorInfo
from awqconv.checkpoint.model import Model, Stored
from awqconv.forms.experts import mixtures
from awqconv.jobs import Copy, Job, Pack, Spec, Verdict, copied, unplaced
from awqconv.repack.floats import lossless
from awqconv.targets.base import Linear, Mixture, Target, layout


@lru_cache(maxsize=4096)
def broken(target: Target, layer: Linear | Mixture) -> str | None:
    """`target.broken`, remembered: a checkpoint has few shapes."""
    return target.broken(layer)


@lru_cache(maxsize=4096)
def stored(name: str, linear: Linear) -> tuple[Spec, ...]:
    """Suffix, dtype and shape of the parts of one layer in a layout, remembered."""
    return tuple((p.suffix, p.dtype, p.shape(linear)) for p in layout(name).parts(linear))


def decide(
    sources: Mapping[str, Stored], linears: Mapping[str, Linear], target: Target
) -> dict[str, Verdict]:
    """The layout of every module: experts of one layer all alike, other modules one by one."""
    rules = {name: broken(target, linear) for name, linear in linears.items()}
    fallbacks = dict.fromkeys(rules, target.fallback)
    for group in mixtures(sources):
        names = group.names
        if target.expert_rules is not None and group.mixture:
            said = broken(target, group.mixture)
        elif target.expert_rules is not None and group.uneven:
            said = group.uneven
        else:
            said = next((rule for name in names if (rule := rules[name])), None)
        rules.update(dict.fromkeys(names, said))
        if target.expert_fallback:
            fallbacks.update(dict.fromkeys(names, target.expert_fallback))
    return {
        name: Verdict(name, linears[name], fallbacks[name] if rule else target.name, rule)
        for name, rule in rules.items()
    }


def jobs(
    model: Model, sources: Mapping[str, Stored], verdicts: Mapping[str, Verdict]
) -> Iterator[Job]:
    """The jobs in source order, with outputs that have a name, dtype and shape but no place yet."""
    for item in model.items():
        if isinstance(item, TensorInfo):
            output = unplaced(item.name, item.dtype, item.shape)
            yield copied(output, model.bytes_of(item), item.name, None)
            continue
        name = item.name
        source, decided = sources[name], verdicts[name]
        out, linear = layout(decided.layout), decided.linear
        outputs = {
            suffix: unplaced(f"{name}.{suffix}", dtype, stack(source.experts, shape))
            for suffix, dtype, shape in stored(decided.layout, linear)
        }
        yield Pack(name, decided.layout, linear, outputs, model.pieces(source))
        for suffix, value in out.constants(linear).items():
            dtype = {"i8": "I64", "i4": "I32"}[value.dtype.str[1:]]
            yield Copy(unplaced(f"{name}.{suffix}", dtype, value.shape), data=value.tobytes())
        if source.bias:
            was, dtype = source.bias, out.bias(linear) or source.bias.dtype
            cast = (was.dtype, dtype) if was.dtype != dtype else None
            yield copied(unplaced(was.name, dtype, was.shape), model.bytes_of(was), was.name, cast)


def kept(
    model: Model, sources: Mapping[str, Stored], verdicts: Mapping[str, Verdict]
) -> Iterator[Job]:
    """Original tensors that the written ones do not determine."""
    for name, source in sources.items():
        decided = verdicts[name]
        lossy = layout(decided.layout).lossy
        rounded = not lossless(source.linear.scales, decided.linear.scales)
        if lossy or rounded:
            yield from originals(model, source, "qzs" if lossy else "s")


def originals(model: Model, source: Stored, of: str = "qzs") -> Iterator[Job]:
    """AWQ tensors of a module as they were: of its codes, zero points, scales."""
    for part in layout("awq").parts(source.linear):
        if part.of in of:
            shape = stack(source.experts, part.shape(source.linear))
            info = unplaced(f"{source.name}.{part.suffix}", part.dtype, shape)
            pieces = model.pieces(source)
            yield Pack(source.name, "awq", source.linear, {part.suffix: info}, pieces)


def stack(experts: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape with the leading dimension of stacked experts, where there are several."""
    return (experts, *shape) if experts > 1 else shape
