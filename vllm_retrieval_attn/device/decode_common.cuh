// SPDX-License-Identifier: Apache-2.0
// Sizes, the descriptor, how work is divided, and arithmetic that decode_twin.py repeats bit by bit.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int PAGE = 1024;                             // tokens of a page
constexpr int TILE = 128;                              // keys of a tile (sketch/sampling.py)
constexpr int TILES = PAGE / TILE;
constexpr int RUN = 4;                                 // neighbouring pages whose rows are attended to together
constexpr int PADDED = (DIM + 63) / 64 * 64;           // coordinates of a code
constexpr int KEY_BYTES = PADDED / 2;                  // of a code
constexpr int BLOCK_BYTES = PAGE * (KEY_BYTES + 2);    // codes, then float16 steps, of one head of one page
constexpr int COLUMNS = 8;                             // of a matrix fragment: two int8 digits of 4 query heads
constexpr int FRAGMENTS = (GROUP + 3) / 4;
constexpr int DIGIT = 254;                             // a query's integer is DIGIT * first digit + second
constexpr u32 ALL = 0xffffffffu;

// Bins of weights, by the upper bits of their float32 form as in sketch/sampling.py: from 2^-40 to 2^24. What lies
// below the bin of the smallest tau in question only adds to `rest`.
constexpr int BIN_SHIFT = 21, FIRST_BIN = (127 - 40) * 4, BINS = 256, BIN_WORDS = BINS + 1;
constexpr int COUNT_SHIFT = 43;                        // a bin is count << 43 | sum of the low 21 bits of its weights
constexpr int SAMPLE_BITS = 24;

// Header and rows of the descriptor, in int64 (decode_kernels.py writes it).
constexpr int HEADER = 2, FIELDS = 8;
enum { ROW_TOKENS, ROW_WRITE, ROW_POSITION, ROW_LIMIT, ROW_TAU, ROW_SEED, ROW_SPACE, ROW_FIRST };
constexpr double TAU_UNIT = 1e-12;

// One query head: score = integer * unit * step + bias, with 15 / 2 times the digits' sum (codes are centred at 7.5)
// taken off the integer first.
struct Asked { float unit, bias; int centre, unused; };

// What stays the same for the life of the process. Shapes are in decode_kernels.py, class Scratch.
struct State {
    i64 layers, heads, rows, entries, host_pages, sketch_pages, first_head;
    double scale;
    const i64* descriptor;
    u8* sketch;
    u16* arena;
    const float *mean, *key_turn, *query_turn;
    signed char* digits;
    Asked* asked;
    u16* scores;
    float* tops;
    float2* records;
    float2* shares;
    u64* bins;
    float* taus;
    int* counts;
    u32* ticket;
    u8* taken;
    float* sums;
    float2* stats;
    i64* read;
};

struct Row {
    int number, tokens, limit, space, first, entries;
    i64 write, position;
    u64 seed;
    double tau;
};

// A page of one row and KV head. `index` numbers these by (row, head, page) and addresses scratch; `from` is the index
// of page 0. keys: attended to within the page.
struct Item {
    Row row;
    int head, page, keys, index, from;
    i64 sketch_page, host_page;
};

__device__ __forceinline__ int rows_of(const State& s) {
    const i64 n = s.descriptor[0];
    return (int)(n < 0 ? 0 : n < s.rows ? n : s.rows);
}

__device__ __forceinline__ int entries_of(const State& s) {
    const i64 n = s.descriptor[1];
    return (int)(n < 0 ? 0 : n < s.entries ? n : s.entries);
}

__device__ __forceinline__ Row row_at(const State& s, int number) {
    const i64 n = s.descriptor[0];
    const i64* at = s.descriptor + HEADER + (i64)number * FIELDS;
    Row row;
    row.number = number;
    row.tokens = (int)at[ROW_TOKENS];
    row.limit = (int)at[ROW_LIMIT];
    row.space = at[ROW_SPACE] != 0;
    row.write = at[ROW_WRITE];
    row.position = at[ROW_POSITION];
    row.seed = (u64)at[ROW_SEED];
    // Weights below 2^-40 have no bins, and none exceeds GROUP.
    row.tau = fmin(fmax((double)at[ROW_TAU] * TAU_UNIT, 1.0 / (1ll << 40)), 8.0);
    const int all = entries_of(s);
    const i64 first = at[ROW_FIRST], end = number + 1 < n ? at[FIELDS + ROW_FIRST] : (i64)all;
    row.first = (int)(first < 0 ? 0 : first < all ? first : all);
    row.entries = (int)(end < all ? end : (i64)all) - row.first;
    if (row.entries < 0) row.entries = 0;
    return row;
}

// Host page and sketch page of one entry; false where either does not exist.
__device__ __forceinline__ bool pages_at(const State& s, i64 entry, i64& host, i64& sketch) {
    const i64* at = s.descriptor + HEADER + s.descriptor[0] * FIELDS + 2 * entry;
    host = at[0];
    sketch = at[1];
    return host >= 0 && host < s.host_pages && sketch >= 0 && sketch < s.sketch_pages;
}

// Pages with keys that are attended to.
__device__ __forceinline__ int pages_of(const Row& row) {
    const int pages = (row.tokens + PAGE - 1) / PAGE;
    return pages < row.entries ? pages : row.entries;
}

__device__ __forceinline__ bool reads_all(const Row& row) { return row.tokens <= row.limit; }

// Where the page of an item lies, and how many of its keys are attended to.
__device__ __forceinline__ void locate(const State& s, Item& item) {
    item.keys = 0;
    if (item.head < s.heads && pages_at(s, item.row.first + item.page, item.host_page, item.sketch_page)) {
        const int left = item.row.tokens - item.page * PAGE;
        item.keys = left < 0 ? 0 : left < PAGE ? left : PAGE;
    }
}

// Item `index`, found by all threads of the block together; `item` holds the one before. True: another row or head.
__device__ __forceinline__ bool find(const State& s, int rows, int index, bool first, Item& item) {
    bool fresh = first;
    if (first || index >= item.from + item.row.entries) {
        fresh = true;
        int at = rows == 1 ? 0 : -1;
        for (int base = 0; base < rows && rows > 1; base += blockDim.x) {
            const int r = base + threadIdx.x;
            const bool before = r < rows && s.descriptor[HEADER + (i64)r * FIELDS + ROW_FIRST] * s.heads <= index;
            at += __syncthreads_count(before);
        }
        item.row = row_at(s, at < 0 ? 0 : at);
        const int heads = (int)s.heads, start = item.row.first * heads;
        item.head = item.row.entries ? (index - start) / item.row.entries : heads;
        item.from = start + item.head * item.row.entries;
    }
    item.index = index;
    item.page = index - item.from;
    locate(s, item);
    return fresh;
}

// The items of this block: a contiguous range, so that it meets few heads.
__device__ __forceinline__ void range_of(const State& s, int& begin, int& end) {
    const i64 all = entries_of(s) * s.heads;
    begin = (int)(blockIdx.x * all / gridDim.x);
    end = (int)((blockIdx.x + 1) * all / gridDim.x);
}

__device__ __forceinline__ u8* sketch_block(const State& s, i64 page, i64 layer, int head) {
    return s.sketch + ((page * s.layers + layer) * s.heads + head) * BLOCK_BYTES;
}

__device__ __forceinline__ u16* arena_row(const State& s, i64 page, i64 layer, int head, int token) {
    return s.arena + (((layer * s.host_pages + page) * s.heads + head) * PAGE + token) * (2 * DIM);
}

// Programmatic dependent launch: a kernel may begin while the one before it in the layer still runs, and then waits for
// its end before it touches what that one writes. Every block must wait, also one without work, so that the end of a
// kernel means the end of all before it.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// exp(x) for x <= 0 to 3e-6, in operations that round the same everywhere: 2^f by a polynomial, 2^k by the exponent.
// Below 2^-125 it stays there.
__device__ __forceinline__ float exp_fixed(float x) {
    const float v = fmaxf(__fmul_rn(x, 1.44269504f), -125.0f);
    const float shifted = __fadd_rn(v, 12582912.0f);  // 1.5 * 2^23: the integer part lands in the low bits
    const float f = __fsub_rn(v, __fsub_rn(shifted, 12582912.0f));
    float p = 0.009582852944731712f;
    p = __fadd_rn(__fmul_rn(p, f), 0.055906426161527634f);
    p = __fadd_rn(__fmul_rn(p, f), 0.24024099111557007f);
    p = __fadd_rn(__fmul_rn(p, f), 0.6931241750717163f);
    p = __fadd_rn(__fmul_rn(p, f), 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

__device__ __forceinline__ float of_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ u16 to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// One element of the model's type.
__device__ __forceinline__ float of_element(u16 x) {
#if BFLOAT16
    return __uint_as_float((u32)x << 16);
#else
    return of_half(x);
#endif
}

__device__ __forceinline__ u16 to_element(float x) {
#if BFLOAT16
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    return to_half(x);
#endif
}

// When a layer's kernels ran: sums over layers of the GPU's clock in ns, modulo 2^64, behind the rows of `read`. Nobody
// waits for these additions.
enum { STAMP_LAYERS, STAMP_WRITE, STAMP_SCORE, STAMP_WEIGH, STAMP_GATHER, STAMP_MERGE, STAMP_END };

__device__ __forceinline__ u64 now_ns() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

__device__ __forceinline__ void stamp(const State& s, int which) {
    if (blockIdx.x || threadIdx.x || s.descriptor[0] <= 0) return;
    atomicAdd((u64*)s.read + s.rows + which, now_ns());
    if (which == STAMP_WRITE) atomicAdd((u64*)s.read + s.rows + STAMP_LAYERS, (u64)1);
}

#define MINUS_INF __int_as_float(0xff800000)

// FlashAttention says +inf for a row without keys.
__device__ __forceinline__ float no_keys(float lse) { return lse == -MINUS_INF ? -lse : lse; }
