// What this machine gives right now, asked for while a benchmark runs: how fast its cores read memory together, and how
// many multiply-adds of bfloat16 and int8 pairs they do from registers.
//
//     cc -O3 -march=native -pthread probe.c -o probe && ./probe 2
//
// Reads a line naming what to measure (read, bf16 or int8), answers with one line, "MEDIAN BEST": GB/s or Gop/s of about
// a third of a second's passes. An instruction that this machine lacks measures as 0.

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { READ, BF16, INT8, STOP };
enum { MAX_THREADS = 64, MAX_PASSES = 4096, DOT_ROUNDS = 400000, CHAINS = 16 };
static const size_t kBytes = (size_t)1 << 30;  // far beyond any last-level cache
static const double kSeconds = 0.35;

typedef int64_t Vector __attribute__((vector_size(64)));
static int task, threads;
static char *memory;
static pthread_barrier_t barrier;
static volatile int64_t sink;  // keeps results from being optimised away

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void read_memory(const char *from, size_t bytes) {
    const Vector *vectors = (const Vector *)from;
    Vector sums[8] = {{0}};
    for (size_t i = 0; i < bytes / sizeof(Vector); i += 8)
        for (int k = 0; k < 8; k++) sums[k] ^= vectors[i + k];
    for (int k = 1; k < 8; k++) sums[0] ^= sums[k];
    sink ^= sums[0][0] ^ sums[0][7];
}

static void multiply(void) {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    // As many independent chains as hide the latency; the empty statement keeps each product where it is.
    if (task == BF16) {
        __m512 sums[CHAINS];
        const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1));
        for (int k = 0; k < CHAINS; k++) sums[k] = _mm512_setzero_ps();
        for (int i = 0; i < DOT_ROUNDS; i++) {
#pragma GCC unroll 16
            for (int k = 0; k < CHAINS; k++) {
                sums[k] = _mm512_dpbf16_ps(sums[k], ones, ones);
                __asm__ volatile("" : "+v"(sums[k]));
            }
        }
        for (int k = 0; k < CHAINS; k++) sink += (int64_t)_mm512_reduce_add_ps(sums[k]);
    } else {
        __m512i sums[CHAINS];
        const __m512i ones = _mm512_set1_epi8(1);
        for (int k = 0; k < CHAINS; k++) sums[k] = _mm512_setzero_si512();
        for (int i = 0; i < DOT_ROUNDS; i++) {
#pragma GCC unroll 16
            for (int k = 0; k < CHAINS; k++) {
                sums[k] = _mm512_dpbusd_epi32(sums[k], ones, ones);
                __asm__ volatile("" : "+v"(sums[k]));
            }
        }
        for (int k = 0; k < CHAINS; k++) sink += _mm512_reduce_add_epi32(sums[k]);
    }
#endif
}

static double work_of_a_pass(void) {
    if (task == READ) return (double)kBytes;
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    return 2.0 * threads * DOT_ROUNDS * CHAINS * (task == BF16 ? 32 : 64);
#else
    return 0;
#endif
}

static void *work(void *argument) {
    const long number = (long)argument;
    cpu_set_t allowed, mine;
    sched_getaffinity(0, sizeof allowed, &allowed);
    CPU_ZERO(&mine);
    for (int core = 0, seen = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &allowed) && seen++ == number) CPU_SET(core, &mine);
    if (CPU_COUNT(&mine)) pthread_setaffinity_np(pthread_self(), sizeof mine, &mine);
    const size_t share = kBytes / (size_t)threads / 4096 * 4096;
    memset(memory + number * share, 1, share);  // a page belongs to who touches it first
    for (;;) {
        pthread_barrier_wait(&barrier);
        if (task == STOP) return NULL;
        if (task == READ) read_memory(memory + number * share, share);
        else multiply();
        pthread_barrier_wait(&barrier);
    }
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **arguments) {
    threads = count > 1 ? atoi(arguments[1]) : 1;
    if (threads < 1 || threads > MAX_THREADS) return 2;
    memory = mmap(NULL, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 1;
    madvise(memory, kBytes, MADV_HUGEPAGE);
    pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1);
    pthread_t workers[MAX_THREADS];
    for (long i = 0; i < threads; i++) pthread_create(&workers[i], NULL, work, (void *)i);
    char line[64];
    static double rates[MAX_PASSES];
    while (fgets(line, sizeof line, stdin)) {
        task = strncmp(line, "bf16", 4) == 0 ? BF16 : strncmp(line, "int8", 4) == 0 ? INT8 : READ;
        int passes = 0;
        const double start_s = now_s();
        while (passes < 3 || (passes < MAX_PASSES && now_s() - start_s < kSeconds)) {
            const double before_s = now_s();
            pthread_barrier_wait(&barrier);
            pthread_barrier_wait(&barrier);
            rates[passes++] = work_of_a_pass() / (now_s() - before_s) / 1e9;
        }
        qsort(rates, (size_t)passes, sizeof *rates, by_size);
        printf("%.3f %.3f\n", rates[passes / 2], rates[passes - 1]);
        fflush(stdout);
    }
    task = STOP;
    pthread_barrier_wait(&barrier);
    for (int i = 0; i < threads; i++) pthread_join(workers[i], NULL);
    return 0;
}
