"""A plan as a table and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from maestro_jax.aot.program import Program, Traffic
from maestro_jax.aot.topology import GIB, Target


def seconds_of(program: Program, target: Target) -> dict[str, float]:
    """Seconds that a program cannot go below, by what bounds it: the roofline. Empty where rates are not known.

    memory: every argument is read once, every temporary written and read once; where tokens are decoded, what the
    program's text says of one. links: what an all-reduce sums travels twice,
    bytes of other collectives once.
    """
    if target.rates is None:
        return {}
    rates = target.rates
    once = program.arguments + 2 * program.temporaries
    travelled = sum(found.bytes * (2 if kind == "all-reduce" else 1) for kind, found in program.collectives.items())
    return {
        "matmuls": program.flops / rates.flops,
        "memory": (program.token_bytes or once) / rates.memory,
        "links": travelled / rates.links,
    }


def table(target: Target, programs: Sequence[Program]) -> str:
    """GiB, TFLOP and seconds a chip."""
    lines = [f"\n{target.name}: {target.count} x {target.kind}, {target.limit / GIB:.2f} GiB a chip"]
    if programs:
        head = ("program", "arguments", "temporaries", "beside", "total GiB", "TFLOP", "least seconds", "collectives")
        rows = [head, *[_row(program, target) for program in programs]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    lines += [_of_a_token(program) for program in programs if program.token_bytes]
    return "\n".join(lines) + "\n"


def _of_a_token(program: Program) -> str:
    moved, least = program.token_bytes, program.least_token_bytes
    return (
        f"{program.name}: {moved / GIB:.2f} GiB to and from memory for a token in every lane, "
        f"{moved / least:.2f} times the least (weights, keys and values once: {least / GIB:.2f} GiB)"
    )


def _row(program: Program, target: Target) -> tuple[str, ...]:
    bounds = seconds_of(program, target)
    slowest = max(bounds, key=lambda name: bounds[name]) if bounds else ""
    calls = ", ".join(f"{found.runs} {kind} {_gib(found)}" for kind, found in program.collectives.items())
    return (
        program.name,
        f"{program.arguments / GIB:.2f}",
        f"{program.temporaries / GIB:.2f}",
        f"{program.beside / GIB:.2f}",
        f"{program.total / GIB:.2f}" + (" refused" if program.refused else ""),
        f"{program.flops / 1e12:.2f}",
        f"{bounds[slowest]:.3g} ({slowest})" if bounds else "unknown",
        calls or "none",
    )


def _gib(traffic: Traffic) -> str:
    return " + ".join(f"{size / GIB:.2f} GiB {dtype}" for dtype, size in sorted(traffic.by_dtype.items()))


def as_json(
    target: Target, programs: Sequence[Program], fits: bool, overrides: Mapping[str, Any], problem: str
) -> dict[str, Any]:
    """Bytes, operations and seconds a chip; the top level is that of the program that needs most memory."""
    worst = max(programs, key=lambda program: program.total, default=None)
    return {
        "fits": fits,
        "topology": target.name,
        "device": target.kind,
        "chips": target.count,
        "estimated": not target.devices,
        "per_chip": _memory(worst, target),
        "flops_per_chip": max((program.flops for program in programs), default=0.0),
        "collectives": _collectives(programs[0]) if programs else {},
        "programs": {program.name: _program(program, target) for program in programs},
        "nearest": {key: list(value) if isinstance(value, tuple) else value for key, value in overrides.items()},
        "problem": problem,
    }


def _memory(program: Program | None, target: Target) -> dict[str, int]:
    if program is None:
        return {"arguments": 0, "temporaries": 0, "beside": 0, "total": 0, "limit": target.limit}
    return {
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "beside": program.beside,
        "total": program.total,
        "limit": target.limit,
    }


def _collectives(program: Program) -> dict[str, dict[str, Any]]:
    return {
        kind: {"count": found.runs, "bytes": found.bytes, "by_dtype": found.by_dtype}
        for kind, found in program.collectives.items()
    }


def _program(program: Program, target: Target) -> dict[str, Any]:
    return {
        **_memory(program, target),
        "refused": program.refused,
        "flops": program.flops,
        "collectives": _collectives(program),
        "largest_all_gather": program.largest_gather,
        "token_bytes": program.token_bytes,
        "least_token_bytes": program.least_token_bytes,
        "splash_attention": program.kernels,
        "least_seconds": seconds_of(program, target),
        "compile_seconds": round(program.seconds, 1),
    }


def verdict(fits: bool, target: Target, programs: Sequence[Program], overrides: dict[str, Any]) -> str:
    if fits and target.limit:
        worst = max(programs, key=lambda program: program.total)
        spare = 1 - worst.total / target.limit
        return f"fits: {spare:.0%} of the memory of a chip stay free at the tightest program ({worst.name})"
    if fits:
        return f"compiles; the backend of {target.name} does not tell its memory"
    if overrides:
        spelled = " ".join(f'--config.{key}="{value}"' for key, value in overrides.items())
        return f"does not fit; the nearest setting found whose update does: {spelled}"
    return "does not fit, nor did any setting that was tried; use a larger slice or a smaller policy"
