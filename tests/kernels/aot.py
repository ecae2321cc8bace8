"""Compile every shipped form of every Triton kernel for GPUs that need not be there.

    python tests/kernels/aot.py [--arch 80 90 100] [MODULE ...]

Prints one JSON line per form: registers, stack bytes (where spills go), spill instructions, shared memory, rows of the
largest matrix product, how many tensor-core and bulk-copy instructions the machine code has, and seconds it took.
Runs in a process of its own: TRITON_INTERPRET must not be set when triton is imported.
"""

import argparse
import importlib
import json
import pathlib
import pkgutil
import re
import subprocess
import tempfile
import time

import triton
import triton.backends.nvidia
import umer1_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin"
# HMMA: tensor cores of any GPU; HGMMA: Hopper's own; UTCHMMA: Blackwell's own; UTMALDG: bulk tensor copies;
# LDGSTS: copies past the registers; LDL, STL: spilled registers.
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDL", "STL")


def compiled(variant, arch: int):
    """The compiled kernel of a `umer1_kernels.variants.Variant`."""
    position = {name: number for number, name in enumerate(variant.kernel.arg_names)}
    signature = {name: "constexpr" if name in variant.constexprs else variant.types[name] for name in position}
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(position[name],): value for name, value in variant.constexprs.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in variant.divisible_by_16},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))


def usage(kernel) -> dict[str, int]:
    """What the machine code of a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _output("cuobjdump", "-res-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", resources).groups()
    counts = {name: len(re.findall(rf"\b{name}(?![A-Z0-9])", code)) for name in INSTRUCTIONS}
    products = re.findall(r"= tt\.dot .*-> tensor<(\d+)x", kernel.asm["ttir"])
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "product_rows": max(map(int, products), default=0),
        **counts,
    }


def _output(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def kernel_modules() -> list[str]:
    """Every module of umer1_kernels that ships kernels."""
    names = [module.name for module in pkgutil.iter_modules(umer1_kernels.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"umer1_kernels.{name}"), "variants")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, e.g. 80 90 100")
    parser.add_argument("modules", nargs="*", help="names under kernels/; all by default")
    arguments = parser.parse_args()
    for name in arguments.modules or kernel_modules():
        for arch in arguments.arch:
            for variant in importlib.import_module(f"umer1_kernels.{name}").variants(arch):
                began = time.monotonic()
                found = usage(compiled(variant, arch)) | {"seconds": round(time.monotonic() - began, 1)}
                print(json.dumps({"module": name, "name": variant.name, "arch": arch, **found}), flush=True)


if __name__ == "__main__":
    main()
