// SPDX-License-Identifier: Apache-2.0
// The partials of all runs of pages and FlashAttention's part, merged by log-sum-exp in the order of the runs.
#pragma once
#include "decode_weigh.cuh"

constexpr int MERGE_THREADS = 512, MERGE_WARPS = MERGE_THREADS / 32;
constexpr int QUADS = DIM / 4, QUADS_A_LANE = (QUADS + 31) / 32;

// out (rows, heads, DIM): strides in elements.
struct Merged { u16* out; i64 row, head; };

__device__ __forceinline__ float block_max(float x) {
    __shared__ float warps[MERGE_WARPS];
    for (int o = 1; o < 32; o <<= 1) x = fmaxf(x, __shfl_xor_sync(ALL, x, o));
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = x;
    __syncthreads();
    x = warps[0];
    for (int w = 1; w < MERGE_WARPS; w++) x = fmaxf(x, warps[w]);
    return x;
}

// Sums over the runs that a warp takes (every MERGE_WARPS-th) of those with `factors`. Runs without rows have factor
// 0 and are loaded all the same, so that many loads are under way at once; what they hold is not used.
__device__ __forceinline__ void add_runs(
    const float* sums, const float* factors, int runs, float4 (&found)[QUADS_A_LANE]
) {
    const int lane = threadIdx.x & 31;
#pragma unroll 8
    for (int p = threadIdx.x >> 5; p < runs; p += MERGE_WARPS) {
        const float factor = factors[p];
        const float4* part = (const float4*)(sums + (i64)p * GROUP * DIM);
#pragma unroll
        for (int i = 0; i < QUADS_A_LANE; i++)
            if (lane + 32 * i < QUADS) {
                const float4 x = part[lane + 32 * i];
                found[i].x += factor > 0 ? factor * x.x : 0, found[i].y += factor > 0 ? factor * x.y : 0;
                found[i].z += factor > 0 ? factor * x.z : 0, found[i].w += factor > 0 ? factor * x.w : 0;
            }
    }
}

extern "C" __global__ void __launch_bounds__(MERGE_THREADS) merge_parts(
    const State s, const Paged paged, const Merged m
) {
    __shared__ __align__(16) float parts[MERGE_WARPS][DIM];
    __shared__ float factors[MERGE_THREADS], totals[MERGE_WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const i64 all = rows_of(s) * s.heads * GROUP;
    stamp(s, STAMP_MERGE);
    for (i64 i = blockIdx.x; i < all; i += gridDim.x) {
        const int g = (int)(i % GROUP), head = (int)(i / GROUP % s.heads);
        const Row row = row_at(s, (int)(i / GROUP / s.heads));
        const int runs = (pages_of(row) + RUN - 1) / RUN;
        if (runs <= 0) continue;
        const i64 from = (row.first * s.heads + (i64)head * row.entries) / RUN;
        const float outside = no_keys(paged.lse[(head * GROUP + g) * paged.head + row.number * paged.row]);
        float top = outside;
        int count = 0;
        for (int p = threadIdx.x; p < runs; p += MERGE_THREADS) {
            const int rows = s.counts[from + p];
            if (rows) top = fmaxf(top, s.stats[(from + p) * GROUP + g].x);
            count += rows;
        }
        top = block_max(top);
        if (g == 0) {
            for (int o = 1; o < 32; o <<= 1) count += __shfl_xor_sync(ALL, count, o);
            if (lane == 0 && count) atomicAdd((u64*)s.read + row.number, (u64)count);
        }
        if (top == MINUS_INF) top = 0;
        float4 sums[QUADS_A_LANE] = {};
        float total = 0;
        for (int begin = 0; begin < runs; begin += MERGE_THREADS) {
            const i64 at = from + begin + threadIdx.x;
            float factor = 0;
            if (begin + threadIdx.x < runs && s.counts[at]) {
                const float2 stat = s.stats[at * GROUP + g];
                factor = __expf(stat.x - top);
                total += factor * stat.y;
            }
            __syncthreads();
            factors[threadIdx.x] = factor;
            __syncthreads();
            add_runs(s.sums + ((from + begin) * GROUP + g) * DIM, factors, min(runs - begin, MERGE_THREADS), sums);
        }
        for (int o = 1; o < 32; o <<= 1) total += __shfl_xor_sync(ALL, total, o);
#pragma unroll
        for (int j = 0; j < QUADS_A_LANE; j++)
            if (lane + 32 * j < QUADS) ((float4*)parts[warp])[lane + 32 * j] = sums[j];
        if (lane == 0) totals[warp] = total;
        __syncthreads();
        const float factor = outside == MINUS_INF ? 0.0f : __expf(outside - top);
        float whole = factor;
        for (int w = 0; w < MERGE_WARPS; w++) whole += totals[w];
        u16* out = m.out + row.number * m.row + (head * GROUP + g) * m.head;
        for (int column = threadIdx.x; column < DIM; column += MERGE_THREADS) {
            float sum = factor > 0 ? factor * of_element(out[column]) : 0.0f;
            for (int w = 0; w < MERGE_WARPS; w++) sum += parts[w][column];
            out[column] = to_element(whole > 0 ? sum / whole : 0.0f);
        }
        __syncthreads();
    }
    stamp(s, STAMP_END);
}
