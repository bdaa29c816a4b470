// SPDX-License-Identifier: Apache-2.0
// Choosing rows and attending to them where they lie, in host memory. A block takes a run of pages of one (row, KV head),
// draws the rows of their tiles, fetches K and V over PCIe, and leaves the run's partial.
//
// Blocks take the runs in order, each the next one when it is done: what is read at a time then spans little of the
// host's memory, without which PCIe loses its speed (store/layout.py). All rows of a run, up to BATCH, are on their way
// at once; choosing is hidden behind what other blocks fetch.
#pragma once
#include "decode_weigh.cuh"

constexpr int GATHER_THREADS = WEIGH_THREADS;
constexpr int GATHER_BLOCKS = 2;                    // of a multiprocessor: what is under way lies in registers
constexpr int CHUNKS = 2 * DIM / 8;                 // of 16 bytes, in a row
constexpr int FLIGHT = 4;                           // chunks that a thread has under way
constexpr int BATCH = FLIGHT * GATHER_THREADS / CHUNKS;  // rows: 16 KB
constexpr int STRIDE = 2 * DIM + 8;                 // elements of a row in shared memory; shifts banks by 16 bytes
constexpr int PARTS = 8;                            // threads that share a dot product
constexpr int LISTED = PAGE;                        // rows that a list holds: all of a page
constexpr int PAIRS = GROUP * DIM / 2;              // of output elements
constexpr int PAIRS_A_THREAD = (PAIRS + GATHER_THREADS - 1) / GATHER_THREADS;

// Rows chosen, ascending: number within the run and log pi. homes: row 0 of each page.
struct Chosen { u16 tokens[LISTED]; float log_pi[LISTED]; const u16* homes[RUN]; int tiles[RUN][TILES]; };

__device__ __forceinline__ u64 mixed(u64 state, u64 value) {  // splitmix64, as sketch/sampling.py
    u64 z = (state ^ value) + 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

__device__ __forceinline__ u64 seed_of(u64 seed, i64 position, i64 layer, i64 head) {
    return mixed(mixed(mixed(mixed(0, seed), (u64)position), (u64)layer), (u64)head);
}

__device__ __forceinline__ u32 chance_of(float weight, float tau) {  // in units of 2^-24
    const float x = ceilf(__fmul_rn(fminf(__fdiv_rn(weight, tau), 1.0f), 16777216.0f));
    return max((u32)x, 1u);
}

// Chances of the thread's four keys; 0 where there is none.
__device__ __forceinline__ void chances_of(
    const State& s, const Item& item, const float2* shares, float tau, u32 (&chances)[4]
) {
    const int first = 4 * threadIdx.x;
    if (reads_all(item.row)) {
        for (int k = 0; k < 4; k++) chances[k] = first + k < item.keys ? 1u << SAMPLE_BITS : 0;
        return;
    }
    float weights[4] = {};
    if (threadIdx.x / 32 * TILE < item.keys) weights_of(s, item.index, shares, weights);
#pragma unroll
    for (int k = 0; k < 4; k++) chances[k] = first + k < item.keys ? chance_of(weights[k], tau) : 0;
}

// Systematic sampling within the warp's tile: bit k is set where key k of the thread is taken.
__device__ __forceinline__ u32 draw(const u32 (&chances)[4], u64 seed, i64 tile) {
    const int lane = threadIdx.x & 31;
    u32 sum = chances[0] + chances[1] + chances[2] + chances[3], before = sum;
    for (int o = 1; o < 32; o <<= 1) {
        const u32 x = __shfl_up_sync(ALL, before, o);
        if (lane >= o) before += x;
    }
    u32 at = (u32)(mixed(seed, (u64)tile) >> (64 - SAMPLE_BITS)) + before - sum, taken = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const u32 end = at + chances[k];
        taken |= (u32)(end >> SAMPLE_BITS != at >> SAMPLE_BITS) << k;
        at = end;
    }
    return taken;
}

__device__ __forceinline__ float log_of(u32 chance) {
    return chance == 1u << SAMPLE_BITS ? 0.0f : logf((float)chance * 5.9604644775390625e-8f);
}

// What a thread drew of its four keys of each page.
struct Drawn { u32 chances[RUN][4], taken[RUN]; };

// Draw the rows of the first `pages` pages of the run that begins with `item`.
__device__ __forceinline__ void draw_run(
    const State& s, const Item& item, int pages, i64 layer, const float2* shares, float tau, u64 seed, Drawn& drawn,
    Chosen& chosen
) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int p = 0; p < RUN; p++) {
        if (p >= pages) break;
        Item page = item;
        page.index += p, page.page += p;
        locate(s, page);
        chances_of(s, page, shares, tau, drawn.chances[p]);
        const u32 taken = drawn.taken[p] = draw(drawn.chances[p], seed, page.page * TILES + warp);
        s.taken[(i64)page.index * GATHER_THREADS + threadIdx.x] = (u8)taken;
        int count = __popc(taken);
        for (int o = 1; o < 32; o <<= 1) count += __shfl_xor_sync(ALL, count, o);
        if (lane == 0) chosen.tiles[p][warp] = count;
        if (threadIdx.x == 0) chosen.homes[p] = arena_row(s, page.keys ? page.host_page : 0, layer, item.head, 0);
    }
}

__device__ __forceinline__ int rows_of_page(const Chosen& chosen, int page) {
    int count = 0;
    for (int w = 0; w < TILES; w++) count += chosen.tiles[page][w];
    return count;
}

// List the rows of pages from `first` on, as many as fit; returns their number and, in `first`, the page after them.
// A barrier must follow.
__device__ __forceinline__ int list_pages(const Drawn& drawn, int pages, int& first, Chosen& chosen) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, begin = first;
    int all = 0;
#pragma unroll
    for (int p = 0; p < RUN; p++) {
        if (p < begin || p >= pages || p != first) continue;
        const int count = rows_of_page(chosen, p);
        if (all + count > LISTED) continue;  // and so do all after it
        const int mine = __popc(drawn.taken[p]);
        int place = mine;
        for (int o = 1; o < 32; o <<= 1) {
            const int x = __shfl_up_sync(ALL, place, o);
            if (lane >= o) place += x;
        }
        place += all - mine;
        for (int w = 0; w < warp; w++) place += chosen.tiles[p][w];
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (drawn.taken[p] >> k & 1) {
                chosen.tokens[place] = (u16)(p * PAGE + 4 * threadIdx.x + k);
                chosen.log_pi[place++] = log_of(drawn.chances[p][k]);
            }
        all += count;
        first = p + 1;
    }
    return all;
}

struct Attention {
    u16 rows[BATCH][STRIDE];
    u16 queries[GROUP][DIM + 8];
    float raised[GROUP][BATCH];
    float top[GROUP], total[GROUP], factor[GROUP];
};

// A batch of rows on its way into registers.
struct Flight { uint4 chunks[FLIGHT]; };

// Start loading `count` rows from number `done` of the list on.
__device__ __forceinline__ void take_off(const Chosen& chosen, int done, int count, Flight& flight) {
#pragma unroll
    for (int k = 0; k < FLIGHT; k++) {
        const int i = threadIdx.x + k * GATHER_THREADS;
        if (i < count * CHUNKS) {
            const int token = chosen.tokens[done + i / CHUNKS];
            const u16* row = chosen.homes[token / PAGE] + (i64)(token % PAGE) * (2 * DIM);
            flight.chunks[k] = *(const uint4*)(row + i % CHUNKS * 8);
        }
    }
}

// Wait for `count` rows, and lay them down in shared memory.
__device__ __forceinline__ void land(const Flight& flight, int count, u16 (*rows)[STRIDE]) {
#pragma unroll
    for (int k = 0; k < FLIGHT; k++) {
        const int i = threadIdx.x + k * GATHER_THREADS;
        if (i < count * CHUNKS) *(uint4*)&rows[i / CHUNKS][i % CHUNKS * 8] = flight.chunks[k];
    }
}

__device__ __forceinline__ float dot(const u16* a, const u16* b) {  // of 8 elements, 16-byte aligned
    const uint4 x = *(const uint4*)a, y = *(const uint4*)b;
    const u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum += of_element((u16)xs[i]) * of_element((u16)ys[i]);
        sum += of_element((u16)(xs[i] >> 16)) * of_element((u16)(ys[i] >> 16));
    }
    return sum;
}

// Scores less log pi of `count` rows and all query heads, PARTS threads each.
__device__ __forceinline__ void score_rows(Attention& a, const float* log_pi, int count, float scale) {
    const int part = threadIdx.x % PARTS;
    for (int base = 0; base < count * GROUP; base += GATHER_THREADS / PARTS) {
        const int pair = base + threadIdx.x / PARTS, row = pair / GROUP, g = pair % GROUP;
        float sum = 0;
        if (row < count)
#pragma unroll
            for (int c = 8 * part; c < DIM; c += 8 * PARTS) sum += dot(a.queries[g] + c, a.rows[row] + c);
        for (int o = 1; o < PARTS; o <<= 1) sum += __shfl_xor_sync(ALL, sum, o);
        if (part == 0 && row < count) a.raised[g][row] = sum * scale - log_pi[row];
    }
}

// The online softmax: raise scores against the new maximum; what is summed so far is to shrink by `factor`.
__device__ __forceinline__ void raise_rows(Attention& a, int count) {
    const int lane = threadIdx.x & 31;
    for (int g = threadIdx.x / 32; g < GROUP; g += GATHER_THREADS / 32) {
        const float old = a.top[g];
        float top = old, sum = 0;
        for (int i = lane; i < count; i += 32) top = fmaxf(top, a.raised[g][i]);
        for (int o = 1; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        for (int i = lane; i < count; i += 32) {
            const float e = __expf(a.raised[g][i] - top);
            a.raised[g][i] = e;
            sum += e;
        }
        for (int o = 1; o < 32; o <<= 1) sum += __shfl_xor_sync(ALL, sum, o);
        __syncwarp();  // all lanes have read top
        if (lane == 0) {
            const float factor = __expf(old - top);
            a.factor[g] = factor;
            a.total[g] = a.total[g] * factor + sum;
            a.top[g] = top;
        }
    }
}

__device__ __forceinline__ void add_values(const Attention& a, int count, float2 (&sums)[PAIRS_A_THREAD]) {
#pragma unroll
    for (int i = 0; i < PAIRS_A_THREAD; i++) {
        const int pair = threadIdx.x + i * GATHER_THREADS, g = pair / (DIM / 2), column = pair % (DIM / 2) * 2;
        if (pair >= PAIRS) break;
        float2 sum = make_float2(sums[i].x * a.factor[g], sums[i].y * a.factor[g]);
#pragma unroll 4
        for (int row = 0; row < count; row++) {
            const u32 v = *(const u32*)(a.rows[row] + DIM + column);
            const float e = a.raised[g][row];
            sum.x += e * of_element((u16)v);
            sum.y += e * of_element((u16)(v >> 16));
        }
        sums[i] = sum;
    }
}

// Fold the `all` rows of the list into the run's sums.
__device__ __forceinline__ void attend(
    const Chosen& chosen, int all, float scale, Attention& a, float2 (&sums)[PAIRS_A_THREAD]
) {
    Flight flight;
    take_off(chosen, 0, min(all, BATCH), flight);
    for (int done = 0; done < all; done += BATCH) {
        const int count = min(all - done, BATCH), left = all - done - count;
        land(flight, count, a.rows);
        if (left > 0) take_off(chosen, done + BATCH, min(left, BATCH), flight);
        __syncthreads();
        score_rows(a, chosen.log_pi + done, count, scale);
        __syncthreads();
        raise_rows(a, count);
        __syncthreads();
        add_values(a, count, sums);
        __syncthreads();
    }
}

// query (rows, heads, DIM): strides in elements.
struct Queries { i64 layer; const u16* query; i64 row, head; };

// Find run `at`, and load its queries.
__device__ __forceinline__ void begin_run(
    const State& s, const Queries& q, int rows, int at, Item& item, Attention& a
) {
    find(s, rows, at * RUN, true, item);
    for (int i = threadIdx.x; i < GROUP * DIM && item.head < s.heads; i += GATHER_THREADS)
        a.queries[i / DIM][i % DIM] =
            q.query[item.row.number * q.row + (item.head * GROUP + i / DIM) * q.head + i % DIM];
}

extern "C" __global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS) gather_rows(
    const State s, const Queries q
) {
    __shared__ __align__(16) Attention a;
    __shared__ Chosen chosen;
    __shared__ float2 shares[GROUP];
    __shared__ int following;
    const int rows = rows_of(s), runs = entries_of(s) / RUN * (int)s.heads;
    stamp(s, STAMP_GATHER);
    Item item;
    int at = blockIdx.x;
    if (at < runs) begin_run(s, q, rows, at, item, a);
    while (at < runs) {
        if (threadIdx.x == 0) following = gridDim.x + (int)atomicAdd(s.ticket, 1u);
        const int pages = min(pages_of(item.row) - item.page, RUN);
        if (pages > 0) {
            const i64 unit = item.row.number * s.heads + item.head;
            if (threadIdx.x < GROUP) {
                shares[threadIdx.x] = s.shares[unit * GROUP + threadIdx.x];
                a.top[threadIdx.x] = -1e30f, a.total[threadIdx.x] = 0;
            }
            const u64 seed = seed_of(item.row.seed, item.row.position, q.layer, s.first_head + item.head);
            const float tau = reads_all(item.row) ? 0.0f : raised_tau(s, item.row, unit);
            if (item.page == 0 && threadIdx.x == 0) s.taus[unit] = tau;
            __syncthreads();
            Drawn drawn;
            draw_run(s, item, pages, q.layer, shares, tau, seed, drawn, chosen);
            float2 sums[PAIRS_A_THREAD] = {};
            int count = 0;
            for (int page = 0; page < pages;) {
                __syncthreads();
                const int listed = list_pages(drawn, pages, page, chosen);
                __syncthreads();
                attend(chosen, listed, (float)s.scale, a, sums);
                count += listed;
            }
            float2* out = (float2*)(s.sums + (i64)at * (GROUP * DIM));
#pragma unroll
            for (int i = 0; i < PAIRS_A_THREAD; i++)
                if (threadIdx.x + i * GATHER_THREADS < PAIRS) out[threadIdx.x + i * GATHER_THREADS] = sums[i];
            if (threadIdx.x < GROUP)
                s.stats[(i64)at * GROUP + threadIdx.x] = make_float2(a.top[threadIdx.x], a.total[threadIdx.x]);
            if (threadIdx.x == 0) s.counts[at] = count;
        }
        __syncthreads();
        at = following;
        __syncthreads();
        if (at < runs) begin_run(s, q, rows, at, item, a);
    }
}

// The place of the thread's first taken key among the block's; `all` gets their number.
__device__ __forceinline__ int place_of(u32 taken, int& all) {
    __shared__ int warps[8];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, mine = __popc(taken);
    int before = mine;
    for (int o = 1; o < 32; o <<= 1) {
        const int x = __shfl_up_sync(ALL, before, o);
        if (lane >= o) before += x;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = before;
    __syncthreads();
    int place = before - mine;
    all = 0;
    for (int w = 0; w < 8; w++) {
        if (w < warp) place += warps[w];
        all += warps[w];
    }
    return place;
}

// What gather_rows chose, as lists: ids (rows, KV heads, capacity) int32 ascending, log_pi float32, counts (rows, KV
// heads) int32. For comparisons and measurements; a decode step does without. One block a (row, KV head).
struct Lists { int* ids; float* log_pi; int* counts; i64 capacity; };

extern "C" __global__ void __launch_bounds__(GATHER_THREADS) list_rows(const State s, const Lists lists) {
    __shared__ float2 shares[GROUP];
    const int rows = rows_of(s);
    for (i64 unit = blockIdx.x; unit < rows * s.heads; unit += gridDim.x) {
        Item item;
        item.row = row_at(s, (int)(unit / s.heads));
        item.head = (int)(unit % s.heads);
        item.from = (item.row.first * (int)s.heads) + item.head * item.row.entries;
        __syncthreads();
        if (threadIdx.x < GROUP) shares[threadIdx.x] = s.shares[unit * GROUP + threadIdx.x];
        __syncthreads();
        i64 written = 0;
        for (item.page = 0; item.page < pages_of(item.row); item.page++) {
            item.index = item.from + item.page;
            if (s.counts[item.index / RUN] == 0) continue;
            locate(s, item);
            u32 chances[4];
            chances_of(s, item, shares, s.taus[unit], chances);
            const u32 taken = s.taken[(i64)item.index * GATHER_THREADS + threadIdx.x];
            int all, place = place_of(taken, all);
            for (int k = 0; k < 4; k++)
                if (taken >> k & 1 && written + place < lists.capacity) {
                    const i64 at = unit * lists.capacity + written + place++;
                    lists.ids[at] = item.page * PAGE + 4 * threadIdx.x + k;
                    lists.log_pi[at] = log_of(chances[k]);
                }
            written += all;
        }
        if (threadIdx.x == 0) lists.counts[unit] = (int)written;
    }
}
