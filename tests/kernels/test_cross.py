"""One program with every kernel (native/), on this machine and on emulated ones: right everywhere, and the same bits.

Functions are named with their digest, a hash of all bits of their results. Processors that this machine has not are
emulated by qemu-user; what cannot be built or emulated here skips, and says why.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ON_X86 = os.uname().machine == "x86_64"

# Processors to emulate, and the tables that run on them.
X86_PROCESSORS = {"qemu64": ["portable"], "Nehalem": ["portable"], "Haswell": ["avx2", "portable"]}
ARM_PROCESSORS = {
    "cortex-a53": ["portable"],
    "neoverse-n1": ["neon", "portable"],
    "max": ["neon_i8mm", "neon", "portable"],
}


def tool(name: str) -> str:
    """A program of PATH or of the environment that runs the tests; the test skips where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return found or pytest.skip(f"{name} is not installed")


def build(folder: Path, *definitions: str) -> Path:
    """The program check_kernels, from the sources as they are."""
    cmake = tool("cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DPLAIT_CHECK_KERNELS=ON"]
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    for command in ([*configure, ninja, *definitions], [cmake, "--build", str(folder)]):
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "check_kernels"


def tables(*command: str) -> list[str]:
    """The tables that the program finds on its machine, best first."""
    return subprocess.run(
        [*command, "--names"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()


def digests(*command: str) -> dict[str, dict[str, str]]:
    """The digest of each function, by table; fails if a function was wrong."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found: dict[str, dict[str, str]] = {}
    for line in ran.stdout.splitlines():
        table, function, verdict, digest = line.split()
        assert verdict == "ok", line
        found.setdefault(table, {})[function] = digest
    return found


def differing(results: Sequence[dict[str, str]]) -> set[str]:
    """Functions that do not have one digest in all results."""
    return {function for function in results[0] if len({result[function] for result in results}) > 1}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """check_kernels for this machine."""
    tool("c++")
    return str(build(tmp_path_factory.mktemp("native")))


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """check_kernels for aarch64, linked statically, so that it needs no libraries of that machine."""
    compiler = tool("aarch64-linux-gnu-g++")
    tool("qemu-aarch64")
    return str(
        build(
            tmp_path_factory.mktemp("arm"),
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",
        )
    )


def test_every_table_of_this_machine_is_right_and_gives_the_same_bits(program: str) -> None:
    found = digests(program)
    assert list(found) == tables(program)
    assert differing(list(found.values())) == set()


@pytest.mark.skipif(not ON_X86, reason="the program is not for x86_64")
@pytest.mark.parametrize("processor", X86_PROCESSORS)
def test_an_older_processor_gets_the_tables_that_it_can_run(program: str, processor: str) -> None:
    emulated = (tool("qemu-x86_64"), "-cpu", processor, program)
    assert tables(*emulated) == X86_PROCESSORS[processor]


@pytest.mark.skipif(not ON_X86, reason="the program is not for x86_64")
def test_a_processor_without_avx_runs_the_portable_table_to_the_same_bits(program: str) -> None:
    found = digests(tool("qemu-x86_64"), "-cpu", "Nehalem", program)
    assert found == {"portable": digests(program, "portable")["portable"]}


@pytest.mark.parametrize("processor", ARM_PROCESSORS)
def test_an_arm_processor_gets_the_tables_that_it_can_run(arm_program: str, processor: str) -> None:
    assert tables(tool("qemu-aarch64"), "-cpu", processor, arm_program) == ARM_PROCESSORS[processor]


def test_the_arm_tables_are_right_and_give_the_bits_of_this_machine(program: str, arm_program: str) -> None:
    here = digests(program, "portable")["portable"]
    found = digests(tool("qemu-aarch64"), "-cpu", "max", arm_program)
    assert list(found) == ARM_PROCESSORS["max"]
    assert differing([here, *found.values()]) == set()
