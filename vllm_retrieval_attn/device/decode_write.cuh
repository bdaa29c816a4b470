// SPDX-License-Identifier: Apache-2.0
// A new token's K and V to the host, its code to the sketch, and the queries as integers; codes of a prefill chunk.
#pragma once
#include "decode_common.cuh"

constexpr int WRITE_THREADS = 512, LANES = 8;  // LANES threads share a row of a matrix

// Multiply a (DIM, DIM) matrix by COUNT vectors x (COUNT, DIM) in shared memory; one y per vector and matrix row.
template <int COUNT, typename Store>
__device__ __forceinline__ void turn(const float* __restrict__ matrix, const float (*x)[DIM], Store store) {
    const int part = threadIdx.x % LANES;
#pragma unroll
    for (int base = 0; base < DIM; base += WRITE_THREADS / LANES) {
        const int out = base + threadIdx.x / LANES;
        float sum[COUNT] = {};
#pragma unroll
        for (int column = 4 * part; column < DIM; column += 4 * LANES) {
            if (out < DIM) {
                const float4 m = __ldg((const float4*)(matrix + (i64)out * DIM + column));
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
                    const float4 v = *(const float4*)(x[i] + column);
                    sum[i] += m.x * v.x + m.y * v.y + m.z * v.z + m.w * v.w;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            for (int o = 1; o < LANES; o <<= 1) sum[i] += __shfl_xor_sync(ALL, sum[i], o);
            if (part == 0 && out < DIM) store(i, out, sum[i]);
        }
    }
}

__device__ __forceinline__ u32 level(float place, float step) {
    const float x = rintf(__fadd_rn(__fdiv_rn(place, step), 7.5f));
    return (u32)fminf(fmaxf(x, 0.0f), 15.0f);
}

// Code and step (sketch/codes.py) of the coordinates of one key, by one warp.
__device__ __forceinline__ void encode_key(const float* places, u8* block, int token) {
    const int lane = threadIdx.x & 31;
    float squares = 0;
    for (int i = lane; i < DIM; i += 32) squares += places[i] * places[i];
    for (int o = 1; o < 32; o <<= 1) squares += __shfl_xor_sync(ALL, squares, o);
    const float wanted = __fmul_rn(0.335f, __fsqrt_rn(__fdiv_rn(squares, (float)DIM)));
    const u16 step = to_half(fmaxf(wanted, 6e-8f));
    const float size = of_half(step);
    for (int b = lane; b < KEY_BYTES; b += 32) {
        const u32 low = level(b < DIM ? places[b] : 0.0f, size);
        const u32 high = level(KEY_BYTES + b < DIM ? places[KEY_BYTES + b] : 0.0f, size);
        block[(i64)token * KEY_BYTES + b] = (u8)(low | high << 4);
    }
    if (lane == 0) ((u16*)(block + (i64)PAGE * KEY_BYTES))[token] = step;
}

// Turned queries (GROUP, PADDED) times the scale, as integers of at most 127 * DIGIT + 127 in two int8 digits: what
// they are in units of the largest / (127 * DIGIT). One warp a query head.
__device__ __forceinline__ void query_digits(
    const State& s, const float (*turned)[PADDED], const float* biases, signed char* digits, Asked* asked
) {
    const int lane = threadIdx.x & 31;
    for (int g = threadIdx.x / 32; g < 4 * FRAGMENTS; g += WRITE_THREADS / 32) {
        float most = 0;
        if (g < GROUP)
            for (int i = lane; i < PADDED; i += 32) most = fmaxf(most, fabsf(turned[g][i]));
        for (int o = 1; o < 32; o <<= 1) most = fmaxf(most, __shfl_xor_sync(ALL, most, o));
        const float unit = __fdiv_rn(fmaxf(most, 1e-30f), 127.0f * DIGIT);
        int sum = 0;
        signed char* first = digits + (i64)(g / 4 * COLUMNS + g % 4 * 2) * PADDED;
        for (int i = lane; i < PADDED; i += 32) {
            const int all = g < GROUP ? __float2int_rn(__fdiv_rn(turned[g][i], unit)) : 0;
            const int high = __float2int_rn(__fdiv_rn((float)all, (float)DIGIT));
            first[i] = (signed char)high;
            first[PADDED + i] = (signed char)(all - high * DIGIT);
            sum += all;
        }
        for (int o = 1; o < 32; o <<= 1) sum += __shfl_xor_sync(ALL, sum, o);
        if (lane == 0 && g < GROUP) asked[g] = Asked{0.5f * unit, biases[g], 15 * sum, 0};
    }
}

// key, value (rows, KV heads, DIM), query (rows, heads, DIM): dense last axis, strides in elements, a multiple of 8.
struct NewTokens {
    i64 layer;
    const u16 *key, *value, *query;
    i64 key_row, key_head, value_row, value_head, query_row, query_head;
};

__device__ __forceinline__ void write_key(const State& s, const NewTokens& t, const Row& row, int head, float* places) {
    i64 host, sketch;
    const i64 page = row.write / PAGE;
    const int token = (int)(row.write % PAGE);
    if (row.write < 0 || page >= row.entries || !pages_at(s, row.first + page, host, sketch)) return;
    const u16* key = t.key + row.number * t.key_row + head * t.key_head;
    const u16* value = t.value + row.number * t.value_row + head * t.value_head;
    uint4* home = (uint4*)arena_row(s, host, t.layer, head, token);
    constexpr int WORDS = DIM / 8;
    for (int i = threadIdx.x; i < 2 * WORDS; i += WRITE_THREADS)
        home[i] = i < WORDS ? ((const uint4*)key)[i] : ((const uint4*)value)[i - WORDS];
    __shared__ __align__(16) float centred[1][DIM];
    const i64 place = (row.space * s.layers + t.layer) * s.heads + head;
    for (int i = threadIdx.x; i < DIM; i += WRITE_THREADS)
        centred[0][i] = __fsub_rn(of_element(key[i]), s.mean[place * DIM + i]);
    __syncthreads();
    turn<1>(s.key_turn + place * DIM * DIM, centred, [&](int, int out, float sum) { places[out] = sum; });
    __syncthreads();
    if (threadIdx.x < 32) encode_key(places, sketch_block(s, sketch, t.layer, head), token);
}

__device__ __forceinline__ void write_queries(
    const State& s, const NewTokens& t, const Row& row, int head, float (*turned)[PADDED]
) {
    __shared__ __align__(16) float queries[GROUP][DIM];
    __shared__ float biases[GROUP];
    const i64 unit = row.number * s.heads + head;
    const i64 place = (row.space * s.layers + t.layer) * s.heads + head;
    for (int i = threadIdx.x; i < BIN_WORDS; i += WRITE_THREADS) s.bins[unit * BIN_WORDS + i] = 0;
    for (int i = threadIdx.x; i < GROUP * DIM; i += WRITE_THREADS)
        queries[i / DIM][i % DIM] =
            of_element(t.query[row.number * t.query_row + (head * GROUP + i / DIM) * t.query_head + i % DIM]);
    for (int i = threadIdx.x; i < GROUP * (PADDED - DIM); i += WRITE_THREADS)
        turned[i / (PADDED - DIM + (PADDED == DIM))][DIM + i % (PADDED - DIM + (PADDED == DIM))] = 0;
    __syncthreads();
    const float scale = (float)s.scale;
    for (int g = threadIdx.x / 32; g < GROUP; g += WRITE_THREADS / 32) {
        float sum = 0;
        for (int i = threadIdx.x & 31; i < DIM; i += 32) sum += queries[g][i] * s.mean[place * DIM + i];
        for (int o = 1; o < 32; o <<= 1) sum += __shfl_xor_sync(ALL, sum, o);
        if ((threadIdx.x & 31) == 0) biases[g] = sum * scale;
    }
    turn<GROUP>(s.query_turn + place * DIM * DIM, queries, [&](int g, int out, float sum) {
        turned[g][out] = sum * scale;
    });
    __syncthreads();
    query_digits(s, turned, biases, s.digits + unit * (FRAGMENTS * COLUMNS * PADDED), s.asked + unit * GROUP);
}

// Items (row, KV head, part): part 0 is the new key, part 1 the queries and the emptying of the histogram.
extern "C" __global__ void __launch_bounds__(WRITE_THREADS) write_tokens(const State s, const NewTokens t) {
    __shared__ float scratch[GROUP][PADDED];
    const i64 items = rows_of(s) * s.heads * 2;
    if (blockIdx.x == 0 && threadIdx.x == 0) *s.ticket = 0;
    stamp(s, STAMP_WRITE);
    let_next_start();
    for (i64 i = blockIdx.x; i < items; i += gridDim.x) {
        const Row row = row_at(s, (int)(i / (2 * s.heads)));
        const int head = (int)(i / 2 % s.heads);
        if (i % 2 == 0)
            write_key(s, t, row, head, scratch[0]);
        else if (row.tokens > 0 && !reads_all(row))
            write_queries(s, t, row, head, scratch);
        __syncthreads();
    }
}

// Where the paged cache has this step's tokens: of each layer, its cache (block, KV head, token, 2 * DIM) and the slot of
// each token of the batch; strides in elements.
constexpr int MOST_LAYERS = 192;
struct Slots {
    i64 block, block_stride, head_stride, token_stride;
    const u16* caches[MOST_LAYERS];
    const i64* slots[MOST_LAYERS];
};

// The new keys and values of all layers at once, from the paged cache; for steps in which no row attends to the host.
// Items (layer, row, KV head).
extern "C" __global__ void __launch_bounds__(WRITE_THREADS) write_layers(const State s, const Slots p) {
    __shared__ float places[DIM];
    const i64 rows = rows_of(s), items = s.layers * rows * s.heads;
    for (i64 i = blockIdx.x; i < items; i += gridDim.x) {
        const int head = (int)(i % s.heads);
        const i64 layer = i / (rows * s.heads);
        const Row row = row_at(s, (int)(i / s.heads % rows));
        const i64 slot = row.write < 0 ? -1 : p.slots[layer][row.number];
        if (slot >= 0) {
            const u16* key = p.caches[layer] + slot / p.block * p.block_stride + slot % p.block * p.token_stride;
            const NewTokens t{layer, key, key + DIM, nullptr, 0, p.head_stride, 0, p.head_stride, 0, 0};
            write_key(s, t, row, head, places);
        }
        __syncthreads();
    }
}

// Codes of a prefill chunk. places (tokens, KV heads, DIM) float32 coordinates; targets (tokens, 2) sketch page and
// offset within it, a page of -1 for a token that is not coded. One warp a token and head.
extern "C" __global__ void __launch_bounds__(256) encode_tokens(
    const State s, const i64 layer, const float* places, const i64* targets, const i64 tokens
) {
    const i64 all = tokens * s.heads;
    for (i64 i = blockIdx.x * 8ll + threadIdx.x / 32; i < all; i += gridDim.x * 8ll) {
        const i64 token = i / s.heads, page = targets[2 * token], offset = targets[2 * token + 1];
        if (page < 0 || page >= s.sketch_pages || offset < 0 || offset >= PAGE) continue;
        encode_key(places + i * DIM, sketch_block(s, page, layer, (int)(i % s.heads)), (int)offset);
    }
}
