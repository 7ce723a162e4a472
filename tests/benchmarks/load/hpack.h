/* As much of HPACK (RFC 7541) as it takes to know how a gRPC call has ended: everything has to be followed, since later
 * headers may refer to earlier ones, but nothing is kept of a header except whether it is `grpc-status`, and 0.
 */
#ifndef HPACK_H
#define HPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Every entry counts for 32 bytes more than it has, and nobody announces more than the default of 4,096. */
#define HEADER_TABLE_SIZE 4096
#define HEADER_TABLE_ENTRIES (HEADER_TABLE_SIZE / 32)

/* What is known of a header. */
struct header {
    bool is_status, is_zero;
    uint32_t name_size, size;
};

/* The headers that the peer may refer to: a ring, of which the newest is at `newest`. */
struct header_table {
    struct header entries[HEADER_TABLE_ENTRIES];
    uint32_t newest, count, size, max_size;
    bool is_estimate; /* The size is too large, perhaps. */
};

enum grpc_status { NO_STATUS, STATUS_OK, STATUS_ERROR, BAD_HEADERS };

void init_header_table(struct header_table *table);

/* The status that is in a block of headers, if there is one. */
enum grpc_status take_headers(struct header_table *table, const uint8_t *p, size_t n);

/* Write a header that the peer has to remember; returns its size. */
size_t put_header_to_remember(uint8_t *to, const char *name, const char *value);

#endif
