"""How the extension is built and chosen: what may run where, and what happens where it cannot."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plait.kernels import isa_names, native_available

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")

# Namespaces of csrc/isa_*.cc as the linker writes them, without the portable one, which may use no more than the rest.
OF_ONE_ISA = re.compile(r"5plait(11avx512_vnni|6avx512|4avx2|9neon_i8mm|4neon)")
# What a processor of 2004 (x86_64) or of Armv8.0 (aarch64) does not know: AVX and all after it; dot products and after.
NOT_EVERYWHERE = {
    "x86_64": re.compile(
        r"v(?!err$|erw$)[a-z0-9]+|andn|bextr|bls[ir]|blsmsk|pdep|pext|[rs][ao][lr]x|sh[lr]x|mulx"
    ),
    "aarch64": re.compile(r"[su]dot|[su]u?s?mmla|bf[a-z0-9]+|[su]qrdml[as]h"),
}
_machine = os.uname().machine


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own, with these environment variables."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PLAIT_ISA", "PLAIT_NATIVE")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def tool(name: str) -> str:
    """A program of PATH or of the environment that runs the tests; the test skips where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return found or pytest.skip(f"{name} is not installed")


@needs_native
@pytest.mark.skipif(_machine not in NOT_EVERYWHERE, reason=f"there is one set of instructions for {_machine}")
def test_no_code_outside_an_isa_unit_holds_instructions_that_not_every_machine_has() -> None:
    from plait.kernels import _native

    listing = subprocess.run(
        [tool("objdump"), "--disassemble", "--no-show-raw-insn", str(_native.__file__)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    function, functions, wrong = "", set[str](), set[str]()
    chosen_by_isa = 0
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1].removesuffix(">:")
            functions.add(function)
        elif line.startswith(" ") and (fields := line.split("\t"))[1:]:
            instruction = fields[1].split(" ")[0]
            if NOT_EVERYWHERE[_machine].fullmatch(instruction):
                if OF_ONE_ISA.search(function):
                    chosen_by_isa += 1
                else:
                    wrong.add(f"{function}: {instruction}")
    assert not wrong, "\n".join(sorted(wrong))
    # The listing was read as meant: it names our functions, and where the instructions belong they were seen.
    assert any("5plait13current_table" in name for name in functions)
    assert any("5plait8portable" in name for name in functions)
    assert chosen_by_isa > 100 or isa_names() == ("portable",)


@needs_native
@pytest.mark.parametrize("isa", isa_names())
def test_the_environment_chooses_among_the_instruction_sets(isa: str) -> None:
    ran = python("from plait.kernels import current_isa; print(current_isa())", PLAIT_ISA=isa)
    assert ran.stdout.strip() == isa, ran.stderr


@needs_native
def test_the_first_instruction_set_is_the_default_and_portable_is_always_there() -> None:
    ran = python("from plait.kernels import current_isa; print(current_isa())")
    assert ran.stdout.strip() == isa_names()[0], ran.stderr
    assert isa_names()[-1] == "portable"


@needs_native
def test_an_unknown_instruction_set_is_refused_with_those_there_are() -> None:
    ran = python("from plait.kernels import current_isa; print(current_isa())", PLAIT_ISA="mmx")
    assert ran.returncode != 0
    assert "BadSetup: PLAIT_ISA asks for the instruction set 'mmx'" in ran.stderr
    assert ", ".join(isa_names()) in ran.stderr


def test_plait_native_0_does_without_the_extension_and_does_not_complain() -> None:
    ran = python(
        "import logging, sys; logging.basicConfig(); from plait.kernels import isa_names, use_native;"
        "print(use_native(), isa_names(), 'plait.kernels._native' in sys.modules)",
        PLAIT_NATIVE="0",
    )
    assert ran.stdout.strip() == "False () False"
    assert ran.stderr == ""


def test_a_missing_extension_is_said_once_and_only_when_it_would_be_used() -> None:
    ran = python(
        "import logging, sys; logging.basicConfig(); sys.modules['plait.kernels._native'] = None;"
        "from plait.kernels import use_native; print('imported', file=sys.stderr, flush=True);"
        "assert not use_native() and not use_native()"
    )
    imported, *warnings = ran.stderr.splitlines()
    assert imported == "imported"
    assert len(warnings) == 1
    assert "without its CPU kernels" in warnings[0]
    assert "install a C++ compiler" in warnings[0]


def test_without_a_compiler_the_build_succeeds_and_installs_nothing(tmp_path: Path) -> None:
    cmake = tool("cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    without = {**os.environ, "CXX": "/nonexistent/c++"}

    def run(*arguments: str) -> str:
        ran = subprocess.run(
            [cmake, *arguments], env=without, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return " ".join(ran.stderr.split())

    said = run("-S", str(ROOT), "-B", str(build), *generator)
    run("--build", str(build))
    run("--install", str(build), "--prefix", str(prefix))
    assert "without its CPU kernels: no C++ compiler was found" in said
    assert not [path for path in prefix.rglob("*") if path.is_file()]


@needs_native
def test_the_types_of_the_extension_are_those_it_has(tmp_path: Path) -> None:
    pytest.importorskip("nanobind", reason="nanobind generates the types; it comes with the extra 'build'")
    tool("ruff")
    written = tmp_path / "_native.pyi"
    subprocess.run(
        [sys.executable, "tools/write_native_types.py", str(written)], cwd=ROOT, timeout=120, check=True
    )
    assert (ROOT / "src/plait/kernels/_native.pyi").read_text() == written.read_text(), (
        "the extension has changed: run python tools/write_native_types.py"
    )
