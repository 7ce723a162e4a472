/* A histogram of latencies with 128 steps to each power of two, so that a percentile is exact to 0.8 %. */
#ifndef LATENCIES_H
#define LATENCIES_H

#include <stdint.h>

void add_latency(uint64_t ns);
uint64_t latency_count(void);
double max_latency_us(void);
double percentile_us(double percent);

#endif
