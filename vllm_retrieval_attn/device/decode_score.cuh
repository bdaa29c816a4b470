// SPDX-License-Identifier: Apache-2.0
// Scores of all codes: integer matrix products of 4-bit codes and two-digit queries.
//
// A warp takes a tile of 128 keys. In mma.m16n8k32 a thread owns rows r and r + 8 of A (r = lane / 4) and two columns
// of the result. Keys are dealt to rows so that a thread's 16 keys are neighbours: block m of 16 keys has key 16 r +
// 2 m in row r and 16 r + 2 m + 1 in row r + 8. The two columns of a thread are the two digits of one query head.
#pragma once
#include "decode_common.cuh"

constexpr int SCORE_THREADS = 256;
constexpr int WORDS = KEY_BYTES / 16;        // 32-bit words of a key that a thread holds
constexpr int WIDE = WORDS < 4 ? WORDS : 4;  // of them in one load
// Blocks of 16 keys loaded at once, while those before are multiplied: 32 registers, fewer where queries take many.
constexpr int STAGE = (PADDED == 256 ? 2 : 4) / (FRAGMENTS == 1 ? 1 : 2), STAGES = 8 / STAGE;
static_assert(STAGES % 2 == 0, "two buffers by turns, the first of the next page after the last");
constexpr int SCORE_BLOCKS = FRAGMENTS == 3 || (FRAGMENTS == 2 && PADDED == 256) ? 1 : 2;  // of a multiprocessor

// Byte of a key where word i of thread t lies.
__device__ __forceinline__ int byte_of(int t, int i) { return i / WIDE * (16 * WIDE) + t * (4 * WIDE) + i % WIDE * 4; }

__device__ __forceinline__ void load_key(const u8* key, int t, u32 (&words)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; i += WIDE) {
        if constexpr (WIDE == 4) {
            const uint4 x = __ldcs((const uint4*)(key + byte_of(t, i)));
            words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
        } else {
            const uint2 x = __ldcs((const uint2*)(key + byte_of(t, i)));
            words[i] = x.x, words[i + 1] = x.y;
        }
    }
}

__device__ __forceinline__ void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The score of a key; every operation rounds as in decode_twin.py.
__device__ __forceinline__ float score_of(int first, int second, const Asked& asked, float step) {
    const int whole = 2 * (DIGIT * first + second) - asked.centre;
    return __fadd_rn(__fmul_rn(__fmul_rn((float)whole, asked.unit), step), asked.bias);
}

struct Stage { u32 x[STAGE][WORDS], y[STAGE][WORDS]; };

// A tile to be scored by a warp: its codes, how many of its keys exist, the item it is of, and the (row, KV head).
struct Tile { const u8* codes; int inside, index, unit; };

// The thread's part of the queries of one (row, KV head).
struct Fragment { u32 low[FRAGMENTS][WORDS], high[FRAGMENTS][WORDS]; Asked asked[FRAGMENTS]; };

__device__ __forceinline__ void load_fragment(const State& s, int unit, Fragment& f) {
    const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3;
    const signed char* digits = s.digits + (i64)unit * (FRAGMENTS * COLUMNS * PADDED);
#pragma unroll
    for (int n = 0; n < FRAGMENTS; n++) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const signed char* column = digits + (n * COLUMNS + r) * PADDED + byte_of(t, i);
            f.low[n][i] = *(const u32*)column;
            f.high[n][i] = *(const u32*)(column + KEY_BYTES);
        }
        f.asked[n] = s.asked[unit * GROUP + (n * 4 + t < GROUP ? n * 4 + t : 0)];
    }
}

// The float16 steps of the thread's 16 keys, two a word. Steps follow the codes of the block.
struct Steps { uint4 even, odd; };

__device__ __forceinline__ void load_steps(const Tile& tile, Steps& steps) {
    const int warp = threadIdx.x >> 5, r = (threadIdx.x & 31) >> 2;
    const u16* at = (const u16*)(tile.codes + (PAGE - warp * TILE) * KEY_BYTES) + warp * TILE + 16 * r;
    steps.even = *(const uint4*)at;
    steps.odd = *(const uint4*)(at + 8);
}

// Codes of one stage of a tile.
__device__ __forceinline__ void load_stage(const u8* codes, int stage, Stage& out) {
    const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3;
#pragma unroll
    for (int m = 0; m < STAGE; m++) {
        const u8* key = codes + (16 * r + 2 * (stage * STAGE + m)) * KEY_BYTES;
        load_key(key, t, out.x[m]);
        load_key(key + KEY_BYTES, t, out.y[m]);
    }
}

// Scores of a tile whose first stage is in buffers[0], against the tile's maximum, as float16; its maximum, and its sum
// of exponentials in units of 2^-24, an integer so that order does not matter. Starts loading the next tile.
__device__ __forceinline__ void score_tile(
    const State& s, const Tile& tile, const Tile& next, const Fragment& f, Stage (&buffers)[2], Steps& steps,
    float* tops, u32* sums
) {
    const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3, inside = tile.inside;
    u16* scores = s.scores + ((i64)tile.index * TILES + threadIdx.x / 32) * (GROUP * TILE);
    const u32 pairs[8] = {
        steps.even.x, steps.even.y, steps.even.z, steps.even.w, steps.odd.x, steps.odd.y, steps.odd.z, steps.odd.w};
    float found[FRAGMENTS][16];
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
        if (stage + 1 < STAGES)
            load_stage(tile.codes, stage + 1, buffers[(stage + 1) % 2]);
        else if (next.inside > 0)
            load_stage(next.codes, 0, buffers[0]), load_steps(next, steps);
        const Stage& now = buffers[stage % 2];
#pragma unroll
        for (int m = 0; m < STAGE; m++) {
            const u32 pair = pairs[stage * STAGE + m];
            const float step_x = of_half((u16)pair), step_y = of_half((u16)(pair >> 16));
#pragma unroll
            for (int n = 0; n < FRAGMENTS; n++) {
                int c[4] = {};
                constexpr u32 M = 0x0f0f0f0f;
#pragma unroll
                for (int i = 0; i < WORDS; i++)
                    multiply(
                        c, now.x[m][i] & M, now.y[m][i] & M, now.x[m][i] >> 4 & M, now.y[m][i] >> 4 & M, f.low[n][i],
                        f.high[n][i]);
                found[n][2 * (stage * STAGE + m)] = score_of(c[0], c[1], f.asked[n], step_x);
                found[n][2 * (stage * STAGE + m) + 1] = score_of(c[2], c[3], f.asked[n], step_y);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < FRAGMENTS; n++) {
        if (inside < TILE)
#pragma unroll
            for (int k = 0; k < 16; k++)
                if (16 * r + k >= inside) found[n][k] = MINUS_INF;
        float top = found[n][0];
#pragma unroll
        for (int k = 1; k < 16; k++) top = fmaxf(top, found[n][k]);
        for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        u32 sum = 0, halves[8];
#pragma unroll
        for (int k = 0; k < 16; k += 2) {
            const u16 a = to_half(__fsub_rn(found[n][k], top)), b = to_half(__fsub_rn(found[n][k + 1], top));
            sum += __float2uint_rn(__fmul_rn(exp_fixed(of_half(a)), 16777216.0f));
            sum += __float2uint_rn(__fmul_rn(exp_fixed(of_half(b)), 16777216.0f));
            halves[k / 2] = (u32)a | (u32)b << 16;
        }
        for (int o = 4; o < 32; o <<= 1) sum += __shfl_xor_sync(ALL, sum, o);
        const int g = n * 4 + t;
        if (g < GROUP) {
            uint4* out = (uint4*)(scores + g * TILE + 16 * r);
            out[0] = make_uint4(halves[0], halves[1], halves[2], halves[3]);
            out[1] = make_uint4(halves[4], halves[5], halves[6], halves[7]);
            if (r == 0) tops[g] = top, sums[g] = sum;
        }
    }
}

// Of each page and query head: the maximum of the scores, and the sum of exponentials relative to it, tiles in order.
__device__ __forceinline__ void record_page(const float (*tops)[GROUP], const u32 (*sums)[GROUP], float2* records) {
    const int g = threadIdx.x;
    if (g >= GROUP) return;
    float top = tops[0][g], sum = 0;
    for (int w = 1; w < TILES; w++) top = fmaxf(top, tops[w][g]);
    for (int w = 0; w < TILES; w++)
        if (sums[w][g] != 0)
            sum = __fadd_rn(sum, __fmul_rn(
                __fmul_rn((float)sums[w][g], 5.9604644775390625e-8f), exp_fixed(__fsub_rn(tops[w][g], top))));
    records[g] = make_float2(top, sum);
}

// This warp's tile of the first item at or after `index` that has keys to be scored; by the whole block. After the last
// item: no keys, index = end.
__device__ __forceinline__ Tile next_tile(
    const State& s, int rows, i64 layer, int begin, int index, int end, Item& item
) {
    const int warp = threadIdx.x >> 5;
    for (; index < end; index++) {
        find(s, rows, index, index == begin, item);
        if (reads_all(item.row) || item.page >= pages_of(item.row)) continue;
        const u8* block = sketch_block(s, item.keys ? item.sketch_page : 0, layer, item.head);
        return Tile{
            block + warp * TILE * KEY_BYTES, min(item.keys - warp * TILE, TILE), index,
            item.row.number * (int)s.heads + item.head};
    }
    return Tile{nullptr, 0, end, -1};
}

// What comes next is known and under way before a page is scored: the page after it is looked up last, while codes of
// the next are on their way.
extern "C" __global__ void __launch_bounds__(SCORE_THREADS, SCORE_BLOCKS) score_keys(const State s, const i64 layer) {
    __shared__ float tops[2][TILES][GROUP];  // of pages by turns: one barrier a page is enough
    __shared__ u32 sums[2][TILES][GROUP];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, rows = rows_of(s);
    Item item;
    int begin, end, turn = 0, unit = -1;
    range_of(s, begin, end);
    Stage buffers[2];
    Steps steps;
    Fragment fragment;
    Tile tile = next_tile(s, rows, layer, begin, begin, end, item);
    wait_for_previous();
    stamp(s, STAMP_SCORE);
    if (tile.inside > 0) load_stage(tile.codes, 0, buffers[0]), load_steps(tile, steps);
    Tile next = next_tile(s, rows, layer, begin, tile.index + 1, end, item);
    while (tile.index < end) {
        if (tile.unit != unit) load_fragment(s, unit = tile.unit, fragment);
        if (tile.inside > 0) {
            score_tile(s, tile, next, fragment, buffers, steps, tops[turn][warp], sums[turn][warp]);
        } else {
            if (next.inside > 0) load_stage(next.codes, 0, buffers[0]), load_steps(next, steps);
            if (lane < GROUP) tops[turn][warp][lane] = MINUS_INF, sums[turn][warp][lane] = 0;
        }
        __syncwarp();
        if (lane < GROUP) s.tops[((i64)tile.index * TILES + warp) * GROUP + lane] = tops[turn][warp][lane];
        __syncthreads();
        record_page(tops[turn], sums[turn], s.records + (i64)tile.index * GROUP);
        tile = next;
        next = next_tile(s, rows, layer, begin, tile.index + 1, end, item);
        turn ^= 1;
    }
}
