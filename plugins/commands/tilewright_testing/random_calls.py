"""Random calls of an object, as a state machine of hypothesis makes them."""

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_random_calls(
    machine: Callable[[], RuleBasedStateMachine], max_examples: int, calls: int
) -> None:
    """Run a state machine max_examples times, with at most so many calls each.

    The calls are the same each time, and nothing is written to a database. Raises what the first
    failing run raises, shortened to the calls that it needs.
    """
    run_state_machine_as_test(
        machine,  # type: ignore[arg-type]  # only called
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=calls,
            deadline=None,
            database=None,
            derandomize=True,
            print_blob=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
