// SPDX-License-Identifier: Apache-2.0
// Weights: the share of every key in the whole attention, their histogram, and tau (sketch/sampling.py, raised_tau).
#pragma once
#include "decode_common.cuh"

constexpr int WEIGH_THREADS = 256, KEYS_A_THREAD = PAGE / WEIGH_THREADS;
static_assert(KEYS_A_THREAD == 4 && WEIGH_THREADS == BINS, "a warp has a tile, a thread has a bin");

// FlashAttention's log-sum-exp over the paged keys, (heads, rows) float32.
struct Paged { const float* lse; i64 head, row; };

// Top score and 1 / sum of exponentials of the whole attention, of each query head of one (row, KV head). Sums are
// integers of 2^-30, so that their order does not matter. By the whole block; a barrier must follow.
__device__ __forceinline__ void whole_attention(const State& s, const Paged& paged, const Item& item, float2* shares) {
    const int lane = threadIdx.x & 31, pages = pages_of(item.row);
    for (int g = threadIdx.x / 32; g < GROUP; g += WEIGH_THREADS / 32) {
        const float outside = no_keys(paged.lse[(item.head * GROUP + g) * paged.head + item.row.number * paged.row]);
        const float2* records = s.records + (i64)item.from * GROUP + g;
        float top = outside;
        for (int p = lane; p < pages; p += 32) top = fmaxf(top, records[p * GROUP].x);
        for (int o = 1; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        if (top == MINUS_INF) top = 0;
        u64 sum = 0;
        for (int p = lane; p < pages; p += 32) {
            const float2 record = records[p * GROUP];
            sum += __float2ull_rn(__fmul_rn(__fmul_rn(record.y, exp_fixed(__fsub_rn(record.x, top))), 1073741824.0f));
        }
        for (int o = 1; o < 32; o <<= 1) sum += __shfl_xor_sync(ALL, sum, o);
        sum += __float2ull_rn(__fmul_rn(exp_fixed(__fsub_rn(outside, top)), 1073741824.0f));
        const float total = __double2float_rn((double)sum * (1.0 / 1073741824.0));
        if (lane == 0) shares[g] = make_float2(top, sum ? __fdiv_rn(1.0f, total) : 0.0f);
    }
}

// Weights of the thread's four keys, from the stored scores.
__device__ __forceinline__ void weights_of(const State& s, int index, const float2* shares, float (&weights)[4]) {
    const i64 tile = (i64)index * TILES + threadIdx.x / 32;
    const uint2* scores = (const uint2*)(s.scores + tile * (GROUP * TILE)) + (threadIdx.x & 31);
    const float* tops = s.tops + tile * GROUP;
#pragma unroll
    for (int k = 0; k < 4; k++) weights[k] = 0;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const uint2 four = scores[g * (TILE / 4)];
        const float2 share = shares[g];
        const float shift = __fsub_rn(tops[g], share.x);
        const u16 halves[4] = {(u16)four.x, (u16)(four.x >> 16), (u16)four.y, (u16)(four.y >> 16)};
#pragma unroll
        for (int k = 0; k < 4; k++)
            weights[k] = __fadd_rn(weights[k], __fmul_rn(exp_fixed(__fadd_rn(of_half(halves[k]), shift)), share.y));
    }
}

// The bin where histogram and search for tau end.
__device__ __forceinline__ int last_bin(const Row& row) {
    return (int)(__float_as_uint((float)row.tau) >> BIN_SHIFT) - FIRST_BIN;
}

// Factor of weights below the last bin: they are summed as integers of 2^-20 times its power of two.
__device__ __forceinline__ float rest_factor(int last) { return __uint_as_float((274 - (last + FIRST_BIN) / 4) << 23); }

extern "C" __global__ void __launch_bounds__(WEIGH_THREADS) weigh_keys(const State s, const Paged paged) {
    __shared__ float2 shares[GROUP];
    __shared__ u32 counts[BINS], lows[BINS], rest;
    const int rows = rows_of(s), thread = threadIdx.x;
    stamp(s, STAMP_WEIGH);
    Item item;
    int begin, end;
    range_of(s, begin, end);
    for (int index = begin; index < end; index++) {
        const bool fresh = find(s, rows, index, index == begin, item);
        if (reads_all(item.row)) continue;
        const i64 unit = item.row.number * s.heads + item.head;
        if (fresh) {
            __syncthreads();
            whole_attention(s, paged, item, shares);
            __syncthreads();
            if (item.page == 0 && thread < GROUP) s.shares[unit * GROUP + thread] = shares[thread];
        }
        if (item.keys == 0) continue;
        counts[thread] = lows[thread] = 0;
        if (thread == 0) rest = 0;
        __syncthreads();
        if (thread / 32 * TILE < item.keys) {
            float weights[4];
            weights_of(s, index, shares, weights);
            const int last = last_bin(item.row);
            const float factor = rest_factor(last);
            u32 below = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (4 * thread + k >= item.keys) continue;
                const u32 bits = __float_as_uint(weights[k]);
                const int bin = min((int)(bits >> BIN_SHIFT) - FIRST_BIN, BINS - 1);
                if (bin >= last) {
                    atomicAdd(&counts[bin], 1u);
                    atomicAdd(&lows[bin], bits & ((1u << BIN_SHIFT) - 1));
                } else {
                    below += __float2uint_rn(__fmul_rn(weights[k], factor));
                }
            }
            for (int o = 1; o < 32; o <<= 1) below += __shfl_xor_sync(ALL, below, o);
            if ((thread & 31) == 0 && below) atomicAdd(&rest, below);
        }
        __syncthreads();
        u64* bins = s.bins + unit * BIN_WORDS;
        if (counts[thread]) atomicAdd(&bins[thread], (u64)counts[thread] << COUNT_SHIFT | lows[thread]);
        if (thread == 0 && rest) atomicAdd(&bins[BINS], (u64)rest);
        __syncthreads();
    }
}

// A non-negative integer times 2^by.
__device__ __forceinline__ u64 shifted(u64 x, int by) { return by >= 0 ? x << by : x >> -by; }

// tau of one (row, KV head), from its histogram, by the whole block. Masses are integers of 2^-59: exact sums.
__device__ __forceinline__ float raised_tau(const State& s, const Row& row, i64 unit) {
    __shared__ int warp_counts[8], found, highest;
    __shared__ u64 warp_masses[8];
    __shared__ float result;
    const int bin = threadIdx.x, lane = bin & 31, warp = bin >> 5, last = last_bin(row);
    const u64* bins = s.bins + unit * BIN_WORDS;
    const u64 packed = bins[bin];
    const int count = (int)(packed >> COUNT_SHIFT), exponent = (bin + FIRST_BIN) / 4;
    const u64 base = (1u << 23) + ((u64)(bin & 3) << BIN_SHIFT);
    const u64 mass = shifted(count * base + (packed & ((1ull << COUNT_SHIFT) - 1)), exponent - 91);
    const u64 rest = shifted(bins[BINS], (last + FIRST_BIN) / 4 - 88);
    if (bin == 0) found = highest = -1;
    int counts = count;  // this bin's and those above
    u64 masses = mass;
    for (int o = 1; o < 32; o <<= 1) {
        const int c = __shfl_down_sync(ALL, counts, o);
        const u64 m = __shfl_down_sync(ALL, masses, o);
        if (lane + o < 32) counts += c, masses += m;
    }
    if (lane == 0) warp_counts[warp] = counts, warp_masses[warp] = masses;
    __syncthreads();
    u64 total = rest;
    for (int w = 0; w < 8; w++) {
        total += warp_masses[w];
        if (w > warp) counts += warp_counts[w], masses += warp_masses[w];
    }
    if (count) atomicMax(&highest, bin);
    const double unit_mass = 1.0 / (1ull << 59);
    const double lower = fmax(row.tau, (double)__uint_as_float((u32)(bin + FIRST_BIN) << BIN_SHIFT));
    const double expected = counts + (double)(total - masses) * unit_mass / lower;
    __syncthreads();
    if (bin >= last && bin <= max(highest, last) && expected > row.limit) atomicMax(&found, bin);
    __syncthreads();
    if (bin == max(found, 0)) {
        const int above = counts - count;
        const double below = (double)(total - (masses - mass)) * unit_mass;
        const double upper = (double)__uint_as_float((u32)(bin + 1 + FIRST_BIN) << BIN_SHIFT);
        result = found < 0 ? (float)row.tau
                           : (float)(above < row.limit ? fmax(below / (row.limit - above), lower) : upper);
    }
    __syncthreads();
    return result;
}
