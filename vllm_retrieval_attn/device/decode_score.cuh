// Scores of all codes: integer matrix products of 4-bit codes and two-digit queries.
//
// A warp takes a tile of 128 keys. In mma.m16n8k32 a thread owns rows r and r + 8 of A (r = lane / 4) and two columns
// of the result. Keys are dealt to rows so that a thread's 16 keys are neighbours: block m of 16 keys has key 16 r + 2 m
// in row r and 16 r + 2 m + 1 in row r + 8. The two columns of a thread are the two digits of one query head.
#pragma once
#include "decode_common.cuh"

constexpr int SCORE_THREADS = 256;
constexpr int WORDS = KEY_BYTES / 16;        // 32-bit words of a key that a thread holds
constexpr int WIDE = WORDS < 4 ? WORDS : 4;  // of them in one load
constexpr int STAGE = 16 / WORDS;            // blocks of 16 keys loaded at once: 32 registers in flight
#ifndef SCORE_BLOCKS  // of a multiprocessor: as many as registers allow without spilling much
#define SCORE_BLOCKS (FRAGMENTS == 1 ? (PADDED <= 128 ? 3 : 2) : FRAGMENTS == 3 && PADDED == 256 ? 1 : 2)
#endif

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

__device__ __forceinline__ void multiply(int (&c)[4], const u32 a0, const u32 a1, const u32 a2, const u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The score of a key; every operation rounds as in decode_twin.py.
__device__ __forceinline__ float score_of(int first, int second, const Asked& asked, float step) {
    const int whole = 2 * (DIGIT * first + second) - asked.centre;
    return __fadd_rn(__fmul_rn(__fmul_rn((float)whole, asked.unit), step), asked.bias);
}

// Scores of a tile, of which `inside` keys exist, against the tile's maximum, as float16; its maximum, and its sum of
// exponentials in units of 2^-24, an integer so that order does not matter.
__device__ __forceinline__ void score_tile(
    const u8* codes, const u16* steps, const signed char* digits, const Asked* asked, int inside, u16* scores, float* tops,
    u32* sums
) {
    const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3;
    u32 low[FRAGMENTS][WORDS], high[FRAGMENTS][WORDS];
#pragma unroll
    for (int n = 0; n < FRAGMENTS; n++)
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const signed char* column = digits + (n * COLUMNS + r) * PADDED + byte_of(t, i);
            low[n][i] = *(const u32*)column;
            high[n][i] = *(const u32*)(column + KEY_BYTES);
        }
    const uint4 even = *(const uint4*)(steps + 16 * r), odd = *(const uint4*)(steps + 16 * r + 8);
    const u32 pairs[8] = {even.x, even.y, even.z, even.w, odd.x, odd.y, odd.z, odd.w};
    Asked mine[FRAGMENTS];
#pragma unroll
    for (int n = 0; n < FRAGMENTS; n++) mine[n] = asked[n * 4 + t < GROUP ? n * 4 + t : 0];
    float found[FRAGMENTS][16];
#pragma unroll
    for (int stage = 0; stage < 8; stage += STAGE) {
        u32 x[STAGE][WORDS], y[STAGE][WORDS];
#pragma unroll
        for (int m = 0; m < STAGE; m++) {
            const u8* key = codes + (16 * r + 2 * (stage + m)) * KEY_BYTES;
            load_key(key, t, x[m]);
            load_key(key + KEY_BYTES, t, y[m]);
        }
#pragma unroll
        for (int m = 0; m < STAGE; m++) {
            const u32 pair = pairs[stage + m];
            const float step_x = of_half((u16)pair), step_y = of_half((u16)(pair >> 16));
#pragma unroll
            for (int n = 0; n < FRAGMENTS; n++) {
                int c[4] = {};
                constexpr u32 M = 0x0f0f0f0f;
#pragma unroll
                for (int i = 0; i < WORDS; i++)
                    multiply(c, x[m][i] & M, y[m][i] & M, x[m][i] >> 4 & M, y[m][i] >> 4 & M, low[n][i], high[n][i]);
                found[n][2 * (stage + m)] = score_of(c[0], c[1], mine[n], step_x);
                found[n][2 * (stage + m) + 1] = score_of(c[2], c[3], mine[n], step_y);
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
            sum = __fadd_rn(
                sum, __fmul_rn(__fmul_rn((float)sums[w][g], 5.9604644775390625e-8f), exp_fixed(__fsub_rn(tops[w][g], top))));
    records[g] = make_float2(top, sum);
}

extern "C" __global__ void __launch_bounds__(SCORE_THREADS, SCORE_BLOCKS) score_keys(const State s, const i64 layer) {
    __shared__ float tops[TILES][GROUP];
    __shared__ u32 sums[TILES][GROUP];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, rows = rows_of(s);
    Item item;
    i64 begin, end;
    range_of(s, begin, end);
    for (i64 index = begin; index < end; index++) {
        find(s, rows, index, index == begin, item);
        if (reads_all(item.row) || item.page >= pages_of(item.row)) continue;
        const i64 unit = item.row.number * s.heads + item.head;
        const int inside = min(item.keys - warp * TILE, TILE);
        if (inside > 0) {
            const u8* block = sketch_block(s, item.sketch_page, layer, item.head);
            score_tile(
                block + warp * TILE * KEY_BYTES, (const u16*)(block + PAGE * KEY_BYTES) + warp * TILE,
                s.digits + unit * (FRAGMENTS * COLUMNS * PADDED), s.asked + unit * GROUP, inside,
                s.scores + (index * TILES + warp) * (GROUP * TILE), tops[warp], sums[warp]);
        } else if (lane < GROUP) {
            tops[warp][lane] = MINUS_INF, sums[warp][lane] = 0;
        }
        __syncwarp();
        if (lane < GROUP) s.tops[(index * TILES + warp) * GROUP + lane] = tops[warp][lane];
        __syncthreads();
        record_page(tops, sums, s.records + index * GROUP);
        __syncthreads();
    }
}
