// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a CPU, so that the sources of device/decode*.cuh are tested where there is no GPU: a block at a
// time, each CUDA thread a fiber (ucontext) that runs until a barrier or a warp operation. Floating-point operations
// round as on the GPU (compile with -ffp-contract=off), but for __expf and logf. What it cannot show: races that one
// order of threads hides (reversed() gives a second order), timing, and dependent launches.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__
using std::max;
using std::min;

struct Dim { unsigned x; };
static Dim threadIdx, blockIdx, gridDim, blockDim;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
template <typename T> static T __ldcv(const T* at) { std::atomic_thread_fence(std::memory_order_seq_cst); return *at; }
static void __nanosleep(unsigned) {}
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {
enum State { RUNS, AT_BLOCK, AT_WARP, DONE };
constexpr int MOST_THREADS = 512, WARP = 32, STACK = 1 << 17;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state;
    unsigned exchanges;       // warp operations so far: slots are used by turns
    int vote;
    uint64_t slots[2][6];
};

static Fiber fibers[MOST_THREADS];
static ucontext_t scheduler;
static int current, threads, votes;
static std::function<void()> body;

static void stop(State state) {
    fibers[current].state = state;
    swapcontext(&fibers[current].context, &scheduler);
}

static void enter() {
    body();
    stop(DONE);
}

static bool all(int first, int count, State state) {
    for (int i = first; i < first + count; i++)
        if (fibers[i].state != state) return false;
    return true;
}

static void release(int first, int count) {
    for (int i = first; i < first + count; i++) fibers[i].state = RUNS;
}

static void run_block() {
    static const bool reversed = getenv("EMULATOR_REVERSED") != nullptr;
    for (int i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.stack.resize(STACK);
        f.state = RUNS, f.exchanges = 0;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    while (!all(0, threads, DONE)) {
        bool moved = false;
        for (int i = 0; i < threads; i++) {
            current = reversed ? threads - 1 - i : i;
            if (fibers[current].state != RUNS) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current].context);
            moved = true;
        }
        for (int w = 0; w < threads; w += WARP)
            if (all(w, WARP, AT_WARP)) release(w, WARP), moved = true;
        if (all(0, threads, AT_BLOCK)) {
            votes = 0;
            for (int i = 0; i < threads; i++) votes += fibers[i].vote;
            release(0, threads), moved = true;
        }
        if (!moved) fprintf(stderr, "emulator: threads wait for each other\n"), abort();
    }
}

template <typename Kernel>
static void launch(int blocks, int size, Kernel kernel) {
    body = kernel, threads = size, gridDim.x = blocks, blockDim.x = size;
    for (int b = 0; b < blocks; b++) blockIdx.x = b, run_block();
}

// What `lane` of the warp brought to this operation.
template <typename T>
static T exchange(T value, int lane) {
    Fiber& mine = fibers[current];
    const int slot = mine.exchanges++ & 1, first = current & ~(WARP - 1);
    memcpy(mine.slots[slot], &value, sizeof value);
    stop(AT_WARP);
    T found;
    memcpy(&found, fibers[first + lane].slots[slot], sizeof found);
    return found;
}

static int lane() { return current & (WARP - 1); }
}  // namespace emulator

static void __syncthreads() { emulator::fibers[emulator::current].vote = 0, emulator::stop(emulator::AT_BLOCK); }
static int __syncthreads_count(bool vote) {
    emulator::fibers[emulator::current].vote = vote;
    emulator::stop(emulator::AT_BLOCK);
    return emulator::votes;
}
static void __syncwarp() { emulator::stop(emulator::AT_WARP); }
template <typename T>
static T __shfl_xor_sync(unsigned, T x, int by) { return emulator::exchange(x, emulator::lane() ^ by); }
template <typename T>
static T __shfl_up_sync(unsigned, T x, int by) { return emulator::exchange(x, max(emulator::lane() - by, 0)); }
template <typename T>
static T __shfl_down_sync(unsigned, T x, int by) { return emulator::exchange(x, min(emulator::lane() + by, 31)); }

template <typename T>
static T aligned(const T* at) {
    if ((uintptr_t)at % sizeof(T)) fprintf(stderr, "emulator: misaligned load\n"), abort();
    return *at;
}
template <typename T>
static T __ldg(const T* at) { return aligned(at); }
template <typename T>
static T __ldcs(const T* at) { return aligned(at); }
template <typename T, typename U>
static T atomicAdd(T* at, U x) { const T old = *at; *at += x; return old; }
template <typename T, typename U>
static T atomicMax(T* at, U x) { const T old = *at; *at = max(*at, (T)x); return old; }

template <typename T>
static T atomicCAS(T* at, T expected, T value) { const T old = *at; if (old == expected) *at = value; return old; }
static void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
static void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename To, typename From>
static To bits(From x) { To y = 0; memcpy(&y, &x, sizeof x); return y; }
static unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
static float __uint_as_float(unsigned x) { return bits<float>(x); }
static float __int_as_float(int x) { return bits<float>(x); }
static float __fmul_rn(float x, float y) { return x * y; }
static float __fadd_rn(float x, float y) { return x + y; }
static float __fsub_rn(float x, float y) { return x - y; }
static float __fdiv_rn(float x, float y) { return x / y; }
static float __fsqrt_rn(float x) { return sqrtf(x); }
static int __float2int_rn(float x) { return (int)lrintf(x); }
static unsigned __float2uint_rn(float x) { return (unsigned)llrintf(x); }
static unsigned long long __float2ull_rn(float x) { return (unsigned long long)llrintf(x); }
static float __double2float_rn(double x) { return (float)x; }
#define __expf expf  // glibc has a function of that name
static int __popc(unsigned x) { return __builtin_popcount(x); }

// What PTX does in the sources; tests/emulator/build.py puts these in its place.
static float ptx_of_half(unsigned short x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
static unsigned short ptx_to_half(float x) { return bits<unsigned short>((_Float16)x); }
static unsigned short ptx_to_bfloat16(float x) {
    const unsigned b = bits<unsigned>(x);
    return (unsigned short)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

static unsigned long long ptx_clock_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
        std::chrono::steady_clock::now().time_since_epoch()).count();
}

// mma.m16n8k32: of A a thread has rows r, r + 8 and four bytes of each half of k; of B column r; of C
// columns 2 t, 2 t + 1.
static void ptx_mma(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    using namespace emulator;
    Fiber& mine = fibers[current];
    const int slot = mine.exchanges++ & 1, first = current & ~(WARP - 1), r = lane() >> 2, t = lane() & 3;
    const uint64_t brought[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(mine.slots[slot], brought, sizeof brought);
    stop(AT_WARP);
    for (int i = 0; i < 4; i++) {
        const int column = 2 * t + (i & 1);
        for (int k = 0; k < 32; k++) {
            const int part = (k & 15) >> 2, half = k >> 4, shift = 8 * (k & 3);
            const uint64_t a = fibers[first + r * 4 + part].slots[slot][(i >= 2) + 2 * half];
            const uint64_t b = fibers[first + column * 4 + part].slots[slot][4 + half];
            c[i] += (int)(a >> shift & 255) * (signed char)(b >> shift & 255);
        }
    }
}
