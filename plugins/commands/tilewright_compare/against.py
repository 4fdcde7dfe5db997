"""A comparison against an earlier report of it: where the candidate's error grew."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from tilewright.errors import ConfigError, on_one_line, quoted
from tilewright.types import ResolvedRuntime
from tilewright_compare.default_run import Plan
from tilewright_compare.judge import FLOOR, Finding, Mode, Phase, slack
from tilewright_compare.provenance import Made

GROWTH = 1.25
"""Largest factor by which an error may grow that is measured on many rows. It is less than FACTOR,
since then and now have the same inputs and the same baseline. See ``slack``."""
_LEAST = min(FLOOR.values())
"""A relative RMS that the order of summation explains in FP32: smaller errors count as this one."""


@frozen(kw_only=True)
class Ratio:
    """Errors of a stage of one layer, pooled over the steps of a phase."""

    mode: Mode
    phase: Phase
    layer: int | None
    stage: str
    rows: int
    """Rows of all steps."""
    candidate: float
    """Relative RMS, pooled over the rows; the baseline's too."""
    baseline: float

    @property
    def ratio(self) -> float | None:
        """The candidate's error over the baseline's; None where the baseline is exact."""
        return self.candidate / self.baseline if self.baseline else None

    @property
    def tensor(self) -> str:
        return self.stage if self.layer is None else f"layers.{self.layer}.{self.stage}"


Key = tuple[str, str, int | None, str]


def _key(ratio: Ratio) -> Key:
    return ratio.mode, ratio.phase, ratio.layer, ratio.stage


def ratios(findings: Iterable[Finding]) -> list[Ratio]:
    """One for each mode, phase, layer and stage, in the order of first appearance."""
    found: dict[Key, Ratio] = {}
    for f in findings:
        if f.candidate is None or f.baseline is None or not f.rows:
            continue
        if not isfinite(f.candidate.relative_rms + f.baseline.relative_rms):
            continue
        new = Ratio(
            mode=f.place.mode,
            phase=f.place.phase,
            layer=f.place.layer,
            stage=f.place.stage,
            rows=f.rows,
            candidate=f.candidate.relative_rms,
            baseline=f.baseline.relative_rms,
        )
        old = found.get(_key(new))
        found[_key(new)] = _pooled(old, new) if old else new
    return list(found.values())


def _pooled(a: Ratio, b: Ratio) -> Ratio:
    rows = a.rows + b.rows

    def mean(name: str) -> float:
        squares = (r.rows * getattr(r, name) ** 2 / rows for r in (a, b))
        return float(sum(squares) ** 0.5)

    return evolve(a, rows=rows, candidate=mean("candidate"), baseline=mean("baseline"))


@frozen(kw_only=True)
class Change:
    """An error then and now."""

    then: Ratio
    now: Ratio

    @property
    def factor(self) -> float:
        """How many times its error of then the candidate has now, each relative to the baseline's
        own error where there is one."""
        ours, before = (max(r.candidate, _LEAST) for r in (self.now, self.then))
        near, near_before = self.now.baseline, self.then.baseline
        return ours / before * (near_before / near if near and near_before else 1.0)

    @property
    def scatter(self) -> float:
        """The largest factor between two right candidates."""
        # Layer 0 has the same input then and now: no layer before it has amplified an error.
        mode: Mode = "isolated" if self.now.layer == 0 else self.now.mode
        return GROWTH * slack(mode, min(self.now.rows, self.then.rows))

    @property
    def grew(self) -> bool:
        return self.now.candidate > _LEAST and self.factor > self.scatter

    @property
    def shrank(self) -> bool:
        return self.then.candidate > _LEAST and self.factor < 1 / self.scatter

    def told(self, report: str) -> str:
        """In words, such as ``3.1 times the error of a.json in prefill, layers.0.output (...)``."""
        then, now = self.then.ratio, self.now.ratio
        figures = f"relative RMS {self.then.candidate:.2g} then, {self.now.candidate:.2g} now"
        if then is not None and now is not None:
            figures = f"ratio to the baseline's own error {then:.2f} then, {now:.2f} now"
        return (
            f"{self.factor:.2g} times the error of {report} in {self.now.phase}, "
            f"{self.now.tensor} ({figures})"
        )


@frozen(kw_only=True)
class Earlier:
    """What an earlier report says."""

    path: str
    dtype: str
    runtime: Mapping[str, Any]
    """The candidate's, as ``ResolvedRuntime`` has it."""
    made: Mapping[str, Any]
    """As ``Made`` has it."""
    plan: Plan
    """What it ran."""
    ratios: Sequence[Ratio]


@frozen(kw_only=True)
class Against:
    """A comparison with an earlier report."""

    report: str
    date: str
    changes: Sequence[Change]
    """Each error that both reports have, in the order of computation, isolated before chained."""
    differences: Sequence[str] = ()
    """What else differs between the two, in words."""

    @property
    def grown(self) -> list[Change]:
        return [c for c in self.changes if c.grew]

    @property
    def passed(self) -> bool:
        return not self.grown

    @property
    def sentence(self) -> str:
        """The first error that grew, in words; empty if none did."""
        grown = self.grown
        if not grown:
            return ""
        more = f", and in {len(grown) - 1} more" if len(grown) > 1 else ""
        return f"{grown[0].told(self.report)}{more}"

    def lines(self) -> list[str]:
        grown, shrunk = self.grown, [c for c in self.changes if c.shrank]
        lines = [
            f"against {self.report} of {self.date}: {len(self.changes)} errors in both, "
            f"{len(grown)} grew beyond scatter, {len(shrunk)} shrank"
        ]
        if grown:
            lines.append(f"most: {max(grown, key=lambda c: c.factor).told(self.report)}")
        if shrunk:
            lines.append(f"least: {min(shrunk, key=lambda c: c.factor).told(self.report)}")
        return [*lines, *(f"against {self.report}: {what}" for what in self.differences)]


def read_report(path: str) -> Earlier:
    """Read a report of ``tilewright compare --json``.

    Raises ConfigError for a file that cannot be read, is not a report, or lacks the figures.
    """
    who = f"--against {quoted(path, 300)}"
    try:
        report = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{who} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{who}: expected a report of `tilewright compare --json --output FILE`, found no "
            f"JSON: {on_one_line(str(error))}"
        ) from error
    if not isinstance(report, dict) or not {"tilewright", "verdict", "findings"} <= report.keys():
        raise ConfigError(
            f"{who}: expected a report of `tilewright compare --json --output FILE`, found JSON "
            "without the keys tilewright, verdict and findings"
        )
    again = "write it again with this version and --json --output"
    if missing := sorted({"ratios", "made", "runtime", "dtype"} - report.keys()):
        raise ConfigError(
            f"{who}: the report of tilewright {report['tilewright']} has no {missing[0]!r}, which "
            f"--against needs: {again}"
        )
    if not report.get("finished"):
        raise ConfigError(f"{who}: that comparison did not finish: {again}")
    if not isinstance(report["made"], dict):
        raise ConfigError(f"{who}: the report does not say how it was made: {again}")
    try:
        return Earlier(
            path=path,
            dtype=report["dtype"],
            runtime=dict(report["runtime"]),
            made=report["made"],
            plan=_plan(report["made"], report["runtime"]),
            ratios=_ratios(report["ratios"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{who}: the report of tilewright {report['tilewright']} has another form "
            f"({type(error).__name__}: {on_one_line(str(error))}): {again}"
        ) from error


def _plan(made: Mapping[str, Any], runtime: Mapping[str, Any]) -> Plan:
    if not made["prompts"] or not all(made["prompts"]):
        raise ValueError(f"expected prompts of at least one token, found {made['prompts']!r:.20}")
    return Plan(
        prompts=[[_integer(0, "token ids", i) for i in ids] for ids in made["prompts"]],
        new_tokens=_integer(1, "new_tokens", made["new_tokens"]),
        chunk=_integer(1, "chunk", made["chunk"]),
        page_size=_integer(1, "page_size", runtime["page_size"]),
    )


def _integer(least: int, what: str, found: Any) -> int:
    """found. Raises ValueError if it is not an integer of at least so much."""
    if not isinstance(found, int) or found < least:
        raise ValueError(f"expected {what} of at least {least}, found {found!r:.20}")
    return found


def _ratios(items: Sequence[Mapping[str, Any]]) -> list[Ratio]:
    if not items:
        raise ValueError("ratios is empty")
    return [_ratio(item) for item in items]


def _ratio(item: Mapping[str, Any]) -> Ratio:
    mode, phase, layer, stage = (item[name] for name in ("mode", "phase", "layer", "stage"))
    if not (
        isinstance(layer, int | None) and all(isinstance(n, str) for n in (mode, phase, stage))
    ):
        raise ValueError("expected names as mode, phase and stage, and a number or null as layer")
    for side in ("candidate", "baseline"):
        error = item[side]  # null: it was not finite
        if not (isinstance(error, int | float) and 0 <= error < inf):
            shown = "null" if error is None else quoted(error)
            raise ValueError(f"expected a finite error of the {side} in {stage}, found {shown}")
    return Ratio(
        mode=mode,
        phase=phase,
        layer=layer,
        stage=stage,
        rows=_integer(1, "rows", item["rows"]),
        candidate=float(item["candidate"]),
        baseline=float(item["baseline"]),
    )


def check_made(earlier: Earlier, now: Made) -> None:
    """Raises ConfigError if another model, other prompts or another reference were compared."""
    record = json.loads(json.dumps(asdict(now)))
    words = {
        "fingerprint": "the model",
        "prompts": "the prompts",
        "new_tokens": "--new-tokens",
        "chunk": "--chunk",
        "reference": "the reference",
    }
    for key, what in words.items():
        then = earlier.made.get(key)
        if key == "reference" and isinstance(then, dict):
            then = then | {"distribution": record[key]["distribution"]}
        if then != record[key]:
            _differs(earlier, what, _brief(key, then), _brief(key, record[key]))


def check_runtime(earlier: Earlier, dtype: str, runtime: ResolvedRuntime) -> None:
    """Raises ConfigError if the candidate ran in other dtypes."""
    if earlier.dtype != dtype:
        _differs(earlier, "the candidate's weight_dtype", earlier.dtype, dtype)
    if (then := earlier.runtime.get("kv_dtype")) != runtime.kv_dtype:
        _differs(earlier, "the candidate's kv_dtype", str(then), runtime.kv_dtype)


def _differs(earlier: Earlier, what: str, then: str, now: str) -> None:
    raise ConfigError(
        f"--against {quoted(earlier.path, 300)}: {what} must be the same, found {then} then and "
        f"{now} now: compare with the same settings, or make a new report"
    )


def _brief(key: str, value: Any) -> str:
    if key == "prompts" and isinstance(value, list):
        return f"{len(value)} of {sum(map(len, value))} tokens"
    if key == "reference" and isinstance(value, dict):
        given = {**value.get("options", {}), **value.get("runtime", {})}
        return f"{value.get('executor')} with {given or 'default settings'}"
    return quoted(value) if key != "fingerprint" else f"{str(value)[:12]}..."


def changes(
    earlier: Earlier, findings: Iterable[Finding], runtime: ResolvedRuntime | None
) -> Against:
    before = {_key(r): r for r in earlier.ratios}
    both = [Change(then=before[_key(r)], now=r) for r in ratios(findings) if _key(r) in before]
    both.sort(key=lambda c: c.now.mode != "isolated")
    differences = []
    if not both:
        differences.append("the two have no tensor in common")
    for name in ("page_size", "device"):
        then, now = earlier.runtime.get(name), getattr(runtime, name, None)
        if then != now:
            differences.append(f"{name} was {then} then and is {now} now")
    return Against(
        report=earlier.path,
        date=str(earlier.made.get("date")),
        changes=both,
        differences=differences,
    )
