#include "latencies.h"

#define STEP_BITS 7
#define STEPS (1u << STEP_BITS)
#define BUCKETS ((64 - STEP_BITS + 1) * STEPS)

static uint64_t histogram[BUCKETS];
static uint64_t count, max;

static unsigned bucket_of(uint64_t ns)
{
    if (ns < STEPS)
        return (unsigned)ns;
    unsigned shift = 63u - (unsigned)__builtin_clzll(ns) - STEP_BITS;
    return (shift + 1) * STEPS + ((unsigned)(ns >> shift) & (STEPS - 1));
}

static uint64_t middle_of(unsigned bucket)
{
    if (bucket < STEPS)
        return bucket;
    unsigned shift = bucket / STEPS - 1;
    return ((uint64_t)(STEPS + bucket % STEPS) << shift) + ((1ull << shift) >> 1);
}

void add_latency(uint64_t ns)
{
    histogram[bucket_of(ns)]++;
    count++;
    if (ns > max)
        max = ns;
}

uint64_t latency_count(void)
{
    return count;
}

double max_latency_us(void)
{
    return (double)max / 1e3;
}

double percentile_us(double percent)
{
    uint64_t rank = (uint64_t)(percent / 100 * (double)count + 0.5), seen = 0;
    if (rank == 0)
        rank = 1;
    for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
        seen += histogram[bucket];
        if (seen >= rank)
            return (double)(middle_of(bucket) < max ? middle_of(bucket) : max) / 1e3;
    }
    return 0;
}
