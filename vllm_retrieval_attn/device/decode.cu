// SPDX-License-Identifier: Apache-2.0
// Kernels of one decode step over retrieved tokens. Compiled at start by decode_kernels.py (NVRTC, no headers), which
// defines DIM (head size), GROUP (query heads of a KV head) and BFLOAT16 (1: bfloat16, 0: float16).
//
// A layer is five launches: write, score, weigh, gather, merge. All read what changes from step to step from the
// descriptor, so that a CUDA graph may replay them. decode_twin.py says in NumPy what each computes; where a weight
// decides which rows are read, both do the same separately rounded operations, so that both read the same rows.
#include "decode_common.cuh"
#include "decode_write.cuh"
#include "decode_score.cuh"
#include "decode_weigh.cuh"
#include "decode_gather.cuh"
#include "decode_merge.cuh"
#include "decode_fetch.cuh"
