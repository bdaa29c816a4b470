// SPDX-License-Identifier: Apache-2.0
// Pages of a layer, copied from host memory to the GPU for prefill, in place of the copy engines: these do not read
// managed memory (store/managed.py), and what the driver copies it with takes all multiprocessors.
#pragma once
#include "decode_common.cuh"

constexpr int FETCH_THREADS = 512;
constexpr int FETCH_FLIGHT = 4;  // chunks of 16 bytes that a thread has under way

// pages (count): host pages; out (count, heads, PAGE, 2, DIM), aligned to 16 bytes. A page that does not exist is zeros.
struct Fetched { i64 layer; const i64* pages; i64 count; uint4* out; };

extern "C" __global__ void __launch_bounds__(FETCH_THREADS) fetch_pages(const State s, const Fetched f) {
    const int chunks = (int)s.heads * PAGE * (2 * DIM / 8), all = (int)f.count * chunks;
    const int step = gridDim.x * FETCH_THREADS;
    for (int first = blockIdx.x * FETCH_THREADS + threadIdx.x; first < all; first += FETCH_FLIGHT * step) {
        uint4 flight[FETCH_FLIGHT] = {};
#pragma unroll
        for (int k = 0; k < FETCH_FLIGHT; k++) {
            const int at = first + k * step;
            const i64 page = at < all ? f.pages[at / chunks] : -1;
            if (page >= 0 && page < s.host_pages)
                flight[k] = ((const uint4*)arena_row(s, page, f.layer, 0, 0))[at % chunks];
        }
#pragma unroll
        for (int k = 0; k < FETCH_FLIGHT; k++)
            if (first + k * step < all) f.out[first + k * step] = flight[k];
    }
}
