// SPDX-License-Identifier: Apache-2.0
// Decode rows that CPU workers answer, within a CUDA graph. Compiled at start by ask_kernels.py (NVRTC), which defines
// DIM, GROUP and BFLOAT16 as for decode.cu.
//
// A layer is three launches. `ask_workers` writes the new keys and values, the queries and the paged part's log-sum-exps
// to host memory and posts the message. `take_answers` waits for the workers and merges what they say. Where they are
// late or given up, `attend_late` attends to all host tokens of the row itself, over the link, and nothing is asked any
// more in this step; so it does for a row whose search failed. What changes from step to step stands in the descriptor
// (ask_kernels.py). Words and messages: store/layout.py, workers/client.py.
#include "decode_common.cuh"

constexpr int ASK_THREADS = 512, LATE_THREADS = 256, LATE_WARPS = LATE_THREADS / 32;
constexpr int WORD = 16;                           // polled words are so many int32 apart
constexpr int WORD_SEQ = 0, WORD_AWAKE = 5, WORD_GIVEN_UP = 6, FIXED_WORDS = 7, ACTOR_WORDS = 5;
constexpr int ASK_HEADER = 5, ASK_FIELDS = 3, WRITE_FIELDS = 2;
enum { ASK_ROWS, ASK_WRITES, ASK_STEP, ASK_LATE, ASK_LIMIT };
enum { ASKED_TOKEN, ASKED_SLOT, ASKED_TOKENS };
enum { TOLD_LATE, TOLD_MISSED, TOLD_WAITED, TOLD_FAILED };  // from TOLD_FAILED on one number a row of the message
enum { KEPT_POSTED, KEPT_LATE, KEPT_WAITED, KEPT_FAILED };

struct Asking {
    i64 layers, heads, rows, actors, pages, page_tokens, table_pages, splits;
    double scale;
    const i64* descriptor;
    u16* arena;                                    // [layer][page][KV head][token][2][DIM]
    int* words;
    const i64* tables;                             // (rows, table_pages)
    u16* queries;                                  // (rows, heads, DIM)
    float* outside;                                // (rows, heads)
    const float* partials;                         // (rows, KV heads, GROUP * (DIM + 1))
    i64* told;                                     // on the host: what a step's end is to know
    i64* kept;                                     // on the GPU, as all below
    int* missed;                                   // (rows * KV heads,) 1: not answered in this layer
    u32* tickets;                                  // (rows * KV heads,) splits that are done
    float* sums;                                   // (rows * KV heads, splits, GROUP, DIM)
    float2* stats;                                 // (rows * KV heads, splits, GROUP) top and total
};

// key, value (tokens, KV heads, DIM), query, out (tokens, heads, DIM): strides in elements; lse (heads, tokens).
struct Tokens {
    i64 layer;
    const u16 *key, *value, *query;
    u16* out;
    const float* lse;
    i64 key_row, key_head, value_row, value_head, query_row, query_head, out_row, out_head, lse_head, lse_row;
};

__device__ __forceinline__ int count_of(const Asking& s, int which) {
    const i64 n = s.descriptor[which];
    return (int)(n < 0 ? 0 : n < s.rows ? n : s.rows);
}

__device__ __forceinline__ int seen(const int* word) { return __ldcv(word); }

__device__ __forceinline__ bool is_late(const Asking& s) {
    return s.descriptor[ASK_LATE] != 0 || __ldcv((const i64*)s.kept + KEPT_LATE) == s.descriptor[ASK_STEP];
}

__device__ __forceinline__ i64 head_elements(const Asking& s) { return s.page_tokens * 2 * DIM; }
__device__ __forceinline__ i64 page_elements(const Asking& s) { return s.heads * head_elements(s); }

extern "C" __global__ void __launch_bounds__(ASK_THREADS) ask_workers(const Asking s, const Tokens t) {
    constexpr int PIECES = DIM / 8;                // of 16 bytes
    const int asked = count_of(s, ASK_ROWS), writes = count_of(s, ASK_WRITES);
    const i64 *rows = s.descriptor + ASK_HEADER, *targets = rows + s.rows * ASK_FIELDS;
    const i64 heads = s.heads * GROUP, layer = s.pages * page_elements(s);
    for (i64 i = threadIdx.x; i < writes * s.heads * 2 * PIECES; i += ASK_THREADS) {
        const i64 part = i % PIECES, half = i / PIECES % 2, head = i / (2 * PIECES) % s.heads;
        const i64* target = targets + i / (2 * PIECES * s.heads) * WRITE_FIELDS;
        if (target[1] < 0 || target[1] >= layer) continue;
        const u16* from = half ? t.value + target[0] * t.value_row + head * t.value_head
                               : t.key + target[0] * t.key_row + head * t.key_head;
        u16* to = s.arena + t.layer * layer + target[1] + head * head_elements(s) + half * DIM;
        ((uint4*)to)[part] = ((const uint4*)from)[part];
    }
    for (i64 i = threadIdx.x; i < asked * heads * PIECES; i += ASK_THREADS) {
        const i64 part = i % PIECES, head = i / PIECES % heads, row = i / PIECES / heads;
        const u16* from = t.query + rows[row * ASK_FIELDS + ASKED_TOKEN] * t.query_row + head * t.query_head;
        ((uint4*)(s.queries + (row * heads + head) * DIM))[part] = ((const uint4*)from)[part];
    }
    for (i64 i = threadIdx.x; i < asked * heads; i += ASK_THREADS) {
        const i64 head = i % heads, token = rows[i / heads * ASK_FIELDS + ASKED_TOKEN];
        s.outside[i] = no_keys(t.lse[head * t.lse_head + token * t.lse_row]);
    }
    __syncthreads();
    if (threadIdx.x == 0 && asked && !is_late(s)) {
        __threadfence_system();                    // of all threads' writes: they came before the barrier
        *(volatile int*)(s.words + WORD_SEQ * WORD) = (int)(s.descriptor[ASK_STEP] + 1 + t.layer);
        s.kept[KEPT_POSTED] = (i64)now_ns();
    }
}

// Whether all workers answer the message `seq` in time.
__device__ __forceinline__ bool answered(const Asking& s, int seq, i64 posted) {
    for (int actor = 0; actor < s.actors; actor++) {
        const int* done = s.words + (FIXED_WORDS + actor * ACTOR_WORDS) * WORD;
        for (int looks = 1; seen(done) != seq; looks++) {
            if ((i64)now_ns() - posted > s.descriptor[ASK_LIMIT]) return false;
            if (looks % 64 == 0 && seen(s.words + WORD_GIVEN_UP * WORD) == s.descriptor[ASK_STEP]) return false;
            __nanosleep(200);
        }
    }
    __threadfence_system();
    return true;
}

__device__ __forceinline__ const float* partial_at(const Asking& s, i64 item) {
    return s.partials + item * (GROUP * (DIM + 1));
}

// Whether the search of a (row, KV head) failed: all of its log-sum-exps are infinity then.
__device__ __forceinline__ bool search_failed(const Asking& s, i64 item) {
    return __ldcv(partial_at(s, item) + GROUP * DIM) == -MINUS_INF;
}

// What a worker says of one (row, KV head), merged with the paged part.
__device__ __forceinline__ void merge_answer(const Asking& s, const Tokens& t, int row, int head) {
    const float* part = partial_at(s, row * s.heads + head);
    const i64 token = s.descriptor[ASK_HEADER + row * ASK_FIELDS + ASKED_TOKEN];
    for (int g = threadIdx.x / 32; g < GROUP; g += blockDim.x / 32) {
        const i64 place = head * GROUP + g;
        const float paged = no_keys(t.lse[place * t.lse_head + token * t.lse_row]);
        const float host = __ldcv(part + GROUP * DIM + g);
        const float top = fmaxf(paged, host) == MINUS_INF ? 0.0f : fmaxf(paged, host);
        const float of_paged = __expf(paged - top), of_host = __expf(host - top), whole = of_paged + of_host;
        u16* out = t.out + token * t.out_row + place * t.out_head;
        for (int i = threadIdx.x & 31; i < DIM; i += 32) {
            const float x = of_paged > 0 ? of_paged * of_element(out[i]) : 0.0f;
            const float y = of_host > 0 ? of_host * __ldcv(part + g * DIM + i) : 0.0f;
            out[i] = to_element(whole > 0 ? (x + y) / whole : 0.0f);
        }
    }
}

extern "C" __global__ void __launch_bounds__(LATE_THREADS) take_answers(const Asking s, const Tokens t) {
    __shared__ int late, missed;
    const i64 items = count_of(s, ASK_ROWS) * s.heads, step = s.descriptor[ASK_STEP];
    if (threadIdx.x == 0 && blockIdx.x < items) {
        const i64 posted = s.kept[KEPT_POSTED];
        late = is_late(s) || !answered(s, (int)(step + 1 + t.layer), posted);
        if (late) s.kept[KEPT_LATE] = step;
        if (blockIdx.x == 0) {
            s.kept[KEPT_WAITED] = (t.layer ? s.kept[KEPT_WAITED] : 0) + (late ? 0 : (i64)now_ns() - posted);
            s.told[TOLD_WAITED] = s.kept[KEPT_WAITED];
            if (t.layer == s.layers - 1) *(volatile int*)(s.words + WORD_AWAKE * WORD) = 0;
        }
    }
    __syncthreads();
    if (blockIdx.x >= items) return;
    for (i64 i = blockIdx.x; i < items; i += gridDim.x) {
        if (threadIdx.x == 0) {
            const bool failed = !late && search_failed(s, i);
            s.missed[i] = missed = late || failed;
            if (failed) {
                s.kept[KEPT_FAILED] = step + 1 + t.layer;
                s.told[TOLD_FAILED + i / s.heads] = step;
            }
        }
        __syncthreads();
        if (!missed) merge_answer(s, t, (int)(i / s.heads), (int)(i % s.heads));
        __syncthreads();
    }
}

// Lanes of a warp that share a token, 16 bytes each, and tokens that a warp has at a time.
constexpr int SHARED_LANES = DIM <= 64 ? 8 : DIM <= 128 ? 16 : 32, WARP_TOKENS = 32 / SHARED_LANES;
constexpr int AHEAD = 4;                           // tokens of each lane that are loaded before any is used
constexpr int PASS = GROUP < 4 ? GROUP : 4;        // query heads at a time
constexpr int KNOWN_PAGES = 64;

__device__ __forceinline__ void unpack(const uint4& x, float (&out)[8]) {
    const u32 words[4] = {x.x, x.y, x.z, x.w};
    for (int i = 0; i < 4; i++) {
        out[2 * i] = of_element((u16)(words[i] & 0xffff));
        out[2 * i + 1] = of_element((u16)(words[i] >> 16));
    }
}

// One thread's softmax over its tokens, of PASS query heads: eight of the output's columns.
struct Running {
    float top[PASS], total[PASS], sum[PASS][8];
};

__device__ __forceinline__ void rescale(Running& r, int g, float top) {
    if (top <= r.top[g]) return;
    const float factor = r.top[g] == MINUS_INF ? 0.0f : __expf(r.top[g] - top);
    r.total[g] *= factor;
    for (int i = 0; i < 8; i++) r.sum[g][i] *= factor;
    r.top[g] = top;
}

// Tokens [begin, end) of the pages known, token 0 lying in the first of them.
__device__ __forceinline__ void attend_tokens(
    const Asking& s, const u16* base, const i64* pages, i64 begin, i64 end, const float (*queries)[DIM], Running& r
) {
    const int lane = threadIdx.x & 31, part = lane % SHARED_LANES, warp = threadIdx.x / 32;
    const bool holds = part * 8 < DIM;
    constexpr i64 STRIDE = LATE_WARPS * WARP_TOKENS;
    for (i64 first = begin + warp * WARP_TOKENS; first < end; first += AHEAD * STRIDE) {
        uint4 keys[AHEAD], values[AHEAD];
        for (int a = 0; a < AHEAD; a++) {
            const i64 token = first + a * STRIDE + lane / SHARED_LANES;
            keys[a] = values[a] = make_uint4(0, 0, 0, 0);
            if (token >= end || !holds) continue;
            const i64 page = pages[token / s.page_tokens];
            if (page < 0 || page >= s.pages) continue;
            const uint4* row = (const uint4*)(base + page * page_elements(s) + token % s.page_tokens * 2 * DIM);
            keys[a] = row[part], values[a] = row[DIM / 8 + part];
        }
        for (int a = 0; a < AHEAD; a++) {
            const bool there = first + a * STRIDE + lane / SHARED_LANES < end;
            float key[8], value[8];
            unpack(keys[a], key), unpack(values[a], value);
            for (int g = 0; g < PASS; g++) {
                float score = 0;
                if (holds)
                    for (int i = 0; i < 8; i++) score += queries[g][part * 8 + i] * key[i];
                for (int o = 1; o < SHARED_LANES; o <<= 1) score += __shfl_xor_sync(ALL, score, o);
                if (!there) continue;
                rescale(r, g, score);
                const float weight = __expf(score - r.top[g]);
                r.total[g] += weight;
                for (int i = 0; i < 8; i++) r.sum[g][i] += weight * value[i];
            }
        }
    }
}

// The threads' softmaxes, added up: top and total of each query head, and its output, unnormalised.
__device__ __forceinline__ void add_up(Running& r, int heads, float* sums, float2* stats) {
    __shared__ float parts[LATE_WARPS][PASS][DIM];
    __shared__ float2 of_warps[LATE_WARPS][PASS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    for (int g = 0; g < PASS; g++) {
        float top = r.top[g];
        for (int o = SHARED_LANES; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        rescale(r, g, top);
        for (int o = SHARED_LANES; o < 32; o <<= 1) {
            r.total[g] += __shfl_xor_sync(ALL, r.total[g], o);
            for (int i = 0; i < 8; i++) r.sum[g][i] += __shfl_xor_sync(ALL, r.sum[g][i], o);
        }
        for (int i = 0; i < 8; i++)
            if (lane < SHARED_LANES && lane * 8 < DIM) parts[warp][g][lane * 8 + i] = r.sum[g][i];
        if (lane == 0) of_warps[warp][g] = make_float2(r.top[g], r.total[g]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * DIM; i += LATE_THREADS) {
        const int g = i / DIM;
        float top = MINUS_INF, total = 0, sum = 0;
        for (int w = 0; w < LATE_WARPS; w++) top = fmaxf(top, of_warps[w][g].x);
        for (int w = 0; w < LATE_WARPS && top != MINUS_INF; w++) {
            const float factor = of_warps[w][g].x == MINUS_INF ? 0.0f : __expf(of_warps[w][g].x - top);
            total += factor * of_warps[w][g].y;
            sum += factor * parts[w][g][i % DIM];
        }
        sums[i] = sum;
        if (i % DIM == 0) stats[g] = make_float2(top, total);
    }
    __syncthreads();
}

// One (row, KV head): all of its splits and the paged part, merged. By all threads of a block.
__device__ __forceinline__ void merge_splits(const Asking& s, const Tokens& t, i64 item, i64 token) {
    for (int i = threadIdx.x; i < GROUP * DIM; i += LATE_THREADS) {
        const i64 g = i / DIM, place = item % s.heads * GROUP + g;
        const float paged = no_keys(t.lse[place * t.lse_head + token * t.lse_row]);
        float top = paged;
        for (i64 p = item * s.splits; p < (item + 1) * s.splits; p++) top = fmaxf(top, __ldcv(&s.stats[p * GROUP + g].x));
        if (top == MINUS_INF) top = 0;
        u16* out = t.out + token * t.out_row + place * t.out_head + i % DIM;
        const float of_paged = __expf(paged - top);
        float whole = of_paged, sum = of_paged > 0 ? of_paged * of_element(*out) : 0.0f;
        for (i64 p = item * s.splits; p < (item + 1) * s.splits; p++) {
            const float factor = __expf(__ldcv(&s.stats[p * GROUP + g].x) - top);
            if (!(factor > 0)) continue;
            whole += factor * __ldcv(&s.stats[p * GROUP + g].y);
            sum += factor * __ldcv(s.sums + (p * GROUP + g) * DIM + i % DIM);
        }
        *out = to_element(whole > 0 ? sum / whole : 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(LATE_THREADS) attend_late(const Asking s, const Tokens t) {
    __shared__ float queries[PASS][DIM];
    __shared__ i64 pages[KNOWN_PAGES];
    __shared__ bool last;
    const i64 all = count_of(s, ASK_ROWS) * s.heads * s.splits, step = s.descriptor[ASK_STEP];
    if (!all) return;
    if (is_late(s)) {
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            s.told[TOLD_LATE] = step;
            s.told[TOLD_MISSED] = __ldcv((const i64*)s.told + TOLD_MISSED) + 1;
        }
    } else if (s.kept[KEPT_FAILED] != step + 1 + t.layer)
        return;
    for (i64 at = blockIdx.x; at < all; at += gridDim.x) {
        const i64 item = at / s.splits, split = at % s.splits;
        if (!s.missed[item]) continue;
        const i64* row = s.descriptor + ASK_HEADER + item / s.heads * ASK_FIELDS;
        const i64 head = item % s.heads, token = row[ASKED_TOKEN], tokens = row[ASKED_TOKENS];
        const i64 begin = split * tokens / s.splits, end = (split + 1) * tokens / s.splits;
        const u16* base = s.arena + t.layer * s.pages * page_elements(s) + head * head_elements(s);
        for (int g0 = 0; g0 < GROUP; g0 += PASS) {
            const int heads = min(PASS, GROUP - g0);
            for (int i = threadIdx.x; i < heads * DIM; i += LATE_THREADS)
                queries[i / DIM][i % DIM] =
                    (float)s.scale *
                    of_element(t.query[token * t.query_row + (head * GROUP + g0 + i / DIM) * t.query_head + i % DIM]);
            Running r;
            for (int g = 0; g < PASS; g++) {
                r.top[g] = MINUS_INF, r.total[g] = 0;
                for (int i = 0; i < 8; i++) r.sum[g][i] = 0;
            }
            for (i64 page = begin / s.page_tokens; page * s.page_tokens < end; page += KNOWN_PAGES) {
                __syncthreads();
                for (int i = threadIdx.x; i < KNOWN_PAGES; i += LATE_THREADS)
                    pages[i] = (page + i) * s.page_tokens < end ? s.tables[row[ASKED_SLOT] * s.table_pages + page + i] : -1;
                __syncthreads();
                const i64 from = page * s.page_tokens, to = from + KNOWN_PAGES * s.page_tokens;
                attend_tokens(s, base, pages, max(begin, from) - from, min(end, to) - from, queries, r);
            }
            const i64 place = at * GROUP + g0;
            add_up(r, heads, s.sums + place * DIM, s.stats + place);
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(s.tickets + item, 1u) == (u32)s.splits - 1;
            if (last) s.tickets[item] = 0;
            __threadfence();
        }
        __syncthreads();
        if (last) merge_splits(s, t, item, token);
        __syncthreads();
    }
}
