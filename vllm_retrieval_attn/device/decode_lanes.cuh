// SPDX-License-Identifier: Apache-2.0
// What CPU lanes do of a layer (device/lanes.py): the board, memory of the host that both sides see, and how runs are
// divided. A lane is told the rows of its runs by messages, attends to them where they lie, and leaves partials. Its
// done word has the number of the layer that it did, of all layers since the start, so nothing is ever reset.
//
// Whether a lane did its part is decided once a layer, for all its runs (`lane_did`). One that is late has its runs
// done by the GPU, and from then on lanes are handed nothing until the host says so by a new generation.
//
// CPU_LANES is 0 where there are none: what they need costs the kernel a few microseconds a layer.
#pragma once
#include "decode_common.cuh"

constexpr int MOST_LANES = 64, MOST_HANDED = 1024, POSTED = 512;  // lanes; runs of a layer; rows of a message
constexpr int LISTED = PAGE;                                      // rows that a list holds: all of a page
constexpr int WHOLE_SHARE = 256;                                  // shares are counted in units of 1 / 256
constexpr int LINE = 64;                                          // bytes of a cache line

// The board: a line with the newest layer's number and its handed runs, a line a lane with the number that it did,
// messages, partials.
__device__ constexpr int in_lines(int bytes) { return (bytes + LINE - 1) / LINE * LINE; }
constexpr int BOARD_DONE = LINE, BOARD_MESSAGES = BOARD_DONE + MOST_LANES * LINE;
// A message: number of the layer; rows, -1: the GPU keeps this run; place among the runs handed of its (row, head); home
// of each page in elements of the arena; then queries, log pi, tokens.
constexpr int MESSAGE_COUNT = 1, MESSAGE_PLACE = 2, MESSAGE_HOMES = 3;
constexpr int MESSAGE_QUERIES = LINE, MESSAGE_LOG_PI = MESSAGE_QUERIES + 2 * GROUP * DIM;
constexpr int MESSAGE_TOKENS = MESSAGE_LOG_PI + 4 * POSTED, MESSAGE_BYTES = in_lines(MESSAGE_TOKENS + 2 * POSTED);
constexpr int PART_FLOATS = DIM + 2, PART_BYTES = in_lines(4 * GROUP * PART_FLOATS);  // sums, top, total of each head
constexpr int BOARD_PARTS = BOARD_MESSAGES + MOST_HANDED * MESSAGE_BYTES;

// Words of the GPU's own: number of the layer; generation and number at which a lane was late; runs handed; then, for
// each lane, the newest verdict (number << 1 | late).
enum { LANES_LAYER, LANES_LATE_GENERATION, LANES_LATE_LAYER, LANES_HANDED, LANES_VERDICTS };

// Rows chosen of a run, ascending: number within the run and log pi. homes: row 0 of each page.
struct Chosen { u16 tokens[LISTED]; float log_pi[LISTED]; const u16* homes[RUN]; int tiles[RUN][TILES]; };

// What a block does next: post a run that lanes are handed, attend to one of the GPU's own, or take what a lane found
// of one. `at`: among those handed, and `place` among those of its (row, head).
enum { POST, OWN, TAKE };
struct Task { int what, at, place; Item item; };

// handed, own: runs of lanes and of the GPU. share: of each (row, head)'s runs, its last ones.
struct Split { int handed, own, share; u64 layer; };

__device__ __forceinline__ int runs_of(const Row& row) { return (pages_of(row) + RUN - 1) / RUN; }

__device__ __forceinline__ u64 seen(const u64* word) { return *(const volatile u64*)word; }

// Runs of each head of a row that go to lanes; `before`: those of the rows before it.
__device__ __forceinline__ int handed_of(const State& s, const Row& row, int share, int before) {
    const int runs = runs_of(row) * share / WHOLE_SHARE;
    return before + runs * (int)s.heads <= MOST_HANDED ? runs : 0;
}

// The same for all blocks of a layer: a lane that is late in this layer changes nothing before the next.
__device__ __forceinline__ Split split_of(const State& s, int rows) {
    Split split = {0, entries_of(s) / RUN * (int)s.heads, 0, 0};
    if (!CPU_LANES) return split;
    split.layer = seen(s.lane_words + LANES_LAYER);
    const i64 share = s.descriptor[HEADER_SHARE];
    if (share <= 0 || s.lanes <= 0) return split;
    const u64 late = seen(s.lane_words + LANES_LATE_GENERATION);
    if (late == (u64)s.descriptor[HEADER_GENERATION] && seen(s.lane_words + LANES_LATE_LAYER) < split.layer) return split;
    split.share = (int)(share < WHOLE_SHARE ? share : WHOLE_SHARE);
    int all = 0;
    for (int r = 0; r < rows; r++) {
        const Row row = row_at(s, r);
        split.handed += handed_of(s, row, split.share, split.handed) * (int)s.heads;
        all += runs_of(row) * (int)s.heads;
    }
    if (split.handed) split.own = all - split.handed;
    else split.share = 0;
    return split;
}

// The `at`-th of the runs handed, or of those that are not; `place`: among those of its (row, head).
__device__ __forceinline__ Item nth_run(const State& s, int rows, const Split& split, int at, bool handed, int& place) {
    Item item;
    int before = 0, passed = 0;
    for (int r = 0; r < rows; r++) {
        item.row = row_at(s, r);
        const int runs = runs_of(item.row), given = handed_of(s, item.row, split.share, before);
        const int count = handed ? given : runs - given;
        if (at - passed < count * (int)s.heads) {
            item.head = (at - passed) / count;
            place = (at - passed) % count;
            item.page = (place + (handed ? runs - given : 0)) * RUN;
            item.from = item.row.first * (int)s.heads + item.head * item.row.entries;
            item.index = item.from + item.page;
            locate(s, item);
            return item;
        }
        passed += count * (int)s.heads, before += given * (int)s.heads;
    }
    item.head = (int)s.heads, item.keys = 0;  // never
    return item;
}

__device__ __forceinline__ int lane_of(const State& s, const Split& split, int at) {
    return (int)(((i64)(at + 1) * s.lanes - 1) / split.handed);
}

__device__ __forceinline__ int first_of(const State& s, const Split& split, int lane) {
    return (int)((i64)lane * split.handed / s.lanes);
}

// Tell lanes that a layer begins; by one thread.
__device__ __forceinline__ void announce(const State& s, const Split& split) {
    s.lane_words[LANES_HANDED] = split.handed;
    if (!split.handed) return;
    volatile u64* board = (volatile u64*)s.board;
    board[1] = split.handed;
    __threadfence_system();
    board[0] = split.layer;
}

// Post a handed run, of which `count` rows are listed; -1: the GPU keeps it. By the whole block.
__device__ __forceinline__ void post(
    const State& s, const Split& split, const Task& task, const Chosen& chosen, int pages, int count,
    const u16 (*queries)[DIM + 8]
) {
    u8* message = s.board + BOARD_MESSAGES + (i64)task.at * MESSAGE_BYTES;
    i64* head = (i64*)message;
    if (count > 0)
        for (int i = threadIdx.x; i < GROUP * DIM; i += blockDim.x)
            ((u16*)(message + MESSAGE_QUERIES))[i] = queries[i / DIM][i % DIM];
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        ((float*)(message + MESSAGE_LOG_PI))[i] = chosen.log_pi[i];
        ((u16*)(message + MESSAGE_TOKENS))[i] = chosen.tokens[i];
    }
    if (threadIdx.x < pages) head[MESSAGE_HOMES + threadIdx.x] = chosen.homes[threadIdx.x] - s.arena;
    if (threadIdx.x == 0) head[MESSAGE_COUNT] = count, head[MESSAGE_PLACE] = task.place;
    // One thread's fence holds for what the block wrote before the barrier; a fence by each took 50 us.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system();
        *(volatile u64*)head = split.layer;
    }
}

// Wait until a lane did its part of this layer, as long as the descriptor allows; by one thread of the GPU, as others
// would take the link's time from what is read.
__device__ __forceinline__ bool waited_for(const State& s, const Split& split, int lane) {
    const volatile u64* done = (const volatile u64*)(s.board + BOARD_DONE + lane * LINE);
    const u64 begin = clock_ns();
    for (;;) {
        const u64 now = clock_ns();  // before it looks: a lane that is done in time is never late
        if (*done == split.layer) return true;
        if (seen(s.lane_words + LANES_LATE_LAYER) == split.layer) return false;
        if ((i64)(now - begin) >= s.descriptor[HEADER_LIMIT]) return false;
    }
}

// Whether the lane of handed run `at` did its part of this layer: what the block of the lane's first run finds holds
// for all. Tickets are drawn in order, so that block is at it, or at an earlier ticket.
__device__ __forceinline__ bool lane_did(const State& s, const Split& split, int at) {
    __shared__ bool did;
    if (threadIdx.x == 0) {
        const int lane = lane_of(s, split, at);
        volatile u64* verdict = s.lane_words + LANES_VERDICTS + lane;
        if (at == first_of(s, split, lane)) {
            did = waited_for(s, split, lane);
            if (!did) {
                *(volatile u64*)(s.lane_words + LANES_LATE_LAYER) = split.layer;
                __threadfence();
                *(volatile u64*)(s.lane_words + LANES_LATE_GENERATION) = (u64)s.descriptor[HEADER_GENERATION];
            }
            __threadfence_system();
            *verdict = split.layer << 1 | !did;
        } else {
            u64 found;
            while ((found = *verdict) >> 1 != split.layer) __nanosleep(100);
            did = !(found & 1);
            __threadfence_system();
        }
        if (!did) {
            // The block that posts this run may be behind: until it is through, nobody knows whether it keeps the run.
            const volatile u64* message = (const volatile u64*)(s.board + BOARD_MESSAGES + (i64)at * MESSAGE_BYTES);
            while (*message != split.layer) {}
            __threadfence_system();
        }
    }
    __syncthreads();
    const bool found = did;
    __syncthreads();
    return found;
}

// Whether the GPU kept a run that was to be handed: more rows than fit in a message.
__device__ __forceinline__ bool kept(const State& s, int run) { return *(const volatile int*)(s.kept + run); }

// Take what a lane left for a handed run. Neighbouring runs of a lane within one unit have one partial, in place of the
// first; one that was kept parts them.
__device__ __forceinline__ void take(const State& s, const Split& split, const Task& task, int run) {
    if (kept(s, run)) return;
    const bool has = task.place == 0 || task.at == first_of(s, split, lane_of(s, split, task.at)) || kept(s, run - 1);
    const float2* part = (const float2*)(s.board + BOARD_PARTS + (i64)task.at * PART_BYTES);
    float2* sums = (float2*)(s.sums + (i64)run * (GROUP * DIM));
    for (int i = threadIdx.x; i < GROUP * PART_FLOATS / 2; i += blockDim.x) {
        const int head = i / (PART_FLOATS / 2), pair = i % (PART_FLOATS / 2);
        const bool stat = pair == DIM / 2;
        const float2 found = has ? __ldcv(part + i) : stat ? make_float2(-1e30f, 0.0f) : make_float2(0.0f, 0.0f);
        (stat ? s.stats[(i64)run * GROUP + head] : sums[head * (DIM / 2) + pair]) = found;
    }
}

// Number this layer. And tell the host of the one before: whether it had runs for lanes, and a late lane. By one thread.
__device__ __forceinline__ void begin_layer(const State& s) {
    u64 *words = s.lane_words, *told = (u64*)s.read + s.rows + STAMP_HANDED;
    if (words[LANES_HANDED]) told[0] += 1, told[1] += words[LANES_LATE_LAYER] == words[LANES_LAYER];
    words[LANES_LAYER] += 1;
}
