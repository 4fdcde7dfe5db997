from concurrent.futures import ThreadPoolExecutor

from pypto import events


def compile_and_assemble(name):
    """Runs as if each of 8 tasks had its own compiler."""
    with ThreadPoolExecutor(max_workers=8) as executor:
        events.note(f"{executor._max_workers} compilers for {name}")
