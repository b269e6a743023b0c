#!/usr/bin/env python3
"""Writes wgmma_instructions.cuh: one specialisation of WgmmaInstruction per type, width and place of A.

PTX ISA, "wgmma.mma_async". The operand lists are as long as the accumulator (N / 2 registers of a thread), which C++
templates cannot spell, so they are spelled here.
"""

import sys

HEAD = """#pragma once
// Written by kernels/cuda/device/wgmma_instructions.py.
#include <cstdint>
namespace moebius::kernels::cuda {
template <typename Type, int kN> struct WgmmaInstruction;
struct E4m3Operands;
struct Bf16Operands;
"""


def instruction(type_name, ptx_type, k, n, transposable):
    registers = n // 2
    d = ", ".join(f"%{i}" for i in range(registers))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(registers))
    at = registers
    op = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{ptx_type}.{ptx_type}"
    lines = [f"template <> struct WgmmaInstruction<{type_name}, {n}> {{"]
    # 16-bit types may be MN-major in shared memory: B beside a K-major A, or A beside a K-major B.
    forms = (("", 0, 0), ("TransposedB", 0, 1), ("TransposedA", 1, 0)) if transposable else (("", None, None),)
    for suffix, a_mn, b_mn in forms:
        shared_tail = "" if b_mn is None else f", {a_mn}, {b_mn}"
        lines.append(f"""  static __device__ __forceinline__ void Shared{suffix}(
      float (&d)[{registers}], uint64_t a, uint64_t b, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{at + 2}, 0;\\n"
                 "{op} {{{d}}}, %{at}, %{at + 1}, p, 1, 1{shared_tail};\\n}}\\n"
                 : {outputs} : "l"(a), "l"(b), "r"(accumulate));
  }}""")
        if a_mn == 1:
            continue  # A from registers has no layout of its own
        register_tail = "" if b_mn is None else f", {b_mn}"
        lines.append(f"""  static __device__ __forceinline__ void Registers{suffix}(
      float (&d)[{registers}], const uint32_t (&a)[4], uint64_t b, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{at + 5}, 0;\\n"
                 "{op} {{{d}}}, {{%{at}, %{at + 1}, %{at + 2}, %{at + 3}}}, %{at + 4}, p, 1, 1{register_tail};\\n}}\\n"
                 : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }}""")
    lines.append("};")
    return "\n".join(lines) + "\n"


def main():
    with open(sys.argv[1], "w", encoding="ascii") as out:
        out.write(HEAD)
        for n in range(8, 257, 8):
            out.write(instruction("E4m3Operands", "e4m3", 32, n, False))
            out.write(instruction("Bf16Operands", "bf16", 16, n, True))
        out.write("}  // namespace moebius::kernels::cuda\n")


if __name__ == "__main__":
    main()
