from concurrent.futures import ThreadPoolExecutor

from pypto import events


def compile_and_assemble(name):
    """As if each of 8 tasks had a compiler to itself."""
    with ThreadPoolExecutor(max_workers=8) as executor:
        events.note(f"{executor._max_workers} compilers for {name}")
