"""Diagnosis of PyPTO's errors: the line that names the cause, and what to do."""

import re

from attrs import frozen


@frozen
class Symptom:
    pattern: str
    advice: str


ONE_ARCHITECTURE = "run each architecture (a2a3, a5) in a process of its own"
MEMORY = Symptom(
    r"malloc failed|out of memory|bad_alloc|cannot allocate|memoryerror|code 207001",
    "free memory of {card}: lower total_pages or max_batch_tokens, or end other processes there",
)
LOST = Symptom(
    r"device.*(lost|offline|unavailable|not found|reset)|lost.*device|heartbeat|"
    r"simpler_init failed|ensure_acl_ready|\b(507\d{3}|107\d{3})\b",
    "check with `npu-smi info` that {card} is present, healthy and free, then load the model again",
)
SYMPTOMS = (
    Symptom(
        r"ptoas.*timed out",
        "too many may run at a time: lower option compile_jobs, and try again",
    ),
    Symptom(
        r"no module named|undefined symbol|importerror",
        "PyPTO is incomplete: `tilewright doctor` reports what is missing",
    ),
    # Only this call returns the runtime's own codes, negated. -1 is its scope deadlock, and also
    # stands for errors without a code: hence "may".
    Symptom(
        r"finalize_native_run failed with code -[1-4]\b|deadlock|(heap|pool) exhausted|dep_pool",
        "a ring may be full: raise options ring_task_window, ring_dep_pool and ring_heap (131072, "
        "131072 and 4294967296 have worked); PyPTO's log above may say more",
    ),
    MEMORY,
    Symptom(
        r"finalize_native_run failed with code -(8|100)\b|timed? ?out|time-out|5070(14|17|34)\b",
        "it made no progress: see PyPTO's log above (PYPTO_RUNTIME_LOG=info says more), and raise "
        "SIMPLER_SCHEDULER_TIMEOUT_MS to tell a slow kernel from one that hangs",
    ),
    LOST,
    Symptom(r"no space left", "free space there, or set option build_dir to another folder"),
    Symptom(r"backend type already set", ONE_ARCHITECTURE),
    Symptom(
        r"pto-isa not available",
        "PyPTO clones it from GitHub: without a network, clone it to build/pto-isa beside the "
        "runtime's pto_isa.pin, and check out the commit in that file",
    ),
    Symptom(
        r"ptoas|kernel_config",
        "check that ptoas has the version that PyPTO pins (toolchain/versions.env in its source)",
    ),
)
OTHERWISE = Symptom("", "try platform=emulated, which tells a faulty kernel from a faulty device")


def symptom(error: BaseException) -> Symptom:
    said = f"{type(error).__name__}: {error}".lower()
    return next((s for s in SYMPTOMS if re.search(s.pattern, said)), OTHERWISE)


def cause(error: BaseException) -> str:
    """The first meaningful line of a message that may be pages long."""
    text = str(error).partition("C++ Traceback")[0]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # Leave out rules, frames and the headings of tables.
    lines = [x for x in lines if x.strip("-=+|^~ ") and not re.fullmatch(r"Function *\| *Error", x)]
    if not lines:
        return type(error).__name__
    said = lines[0]
    if said.endswith(":") and len(lines) > 1:
        cells = [x for x in lines[1:] if "|" in x]
        said += " " + (" ".join(x.replace("|", "").strip() for x in cells) or lines[1])
    said = " ".join(said.split())
    match getattr(error, "span", None):
        case {"filename": str() as file, "line": int() as line}:
            said += f" ({file}, line {line})"
    return said if len(said) <= 400 else f"{said[:400]}..."
