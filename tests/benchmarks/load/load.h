/* What the load generator and a dialect, one of the protocols that it speaks, know of each other.
 *
 * The generator (load.c) has the connections, the closed loop, the clock, the figures and the patience. A dialect has
 * the bytes: what a connection begins with, how a request looks, where what has arrived ends and whether it is right,
 * and what has to be answered in between. It knows calls by their ids only. It must cost little: whatever doesn't
 * depend on the call is built once, by `prepare`.
 */
#ifndef LOAD_H
#define LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))

struct connection; /* The generator's. */

struct dialect {
    const char *name;

    /* Build what all connections share. */
    void (*prepare)(void);

    /* A connection has been made: make its `state_of`, if there is any, and say what comes first. Calls begin when
     * `is_ready` has been told of every connection, here or by what `take` finds.
     */
    void (*greet)(struct connection *c);

    /* Append the request of a call. Its id is no other's that is outstanding on this connection, and less than
     * `calls_in_flight` at first.
     */
    void (*request)(struct connection *c, uint32_t id);

    /* Take the one message, or frame, that begins at p, of which n bytes are there, at least one. Returns its size; 0
     * if it isn't complete; -1, after a complaint, if the connection is of no use any more.
     */
    ssize_t (*take)(struct connection *c, const uint8_t *p, size_t n);
};

extern const struct dialect msgpack_rpc, zerorpc, rpyc, grpc;

/* ---- What every call is: the same method with the same payload, printable ASCII, as its only param and result. ---- */

extern const char *method;
extern uint8_t *payload;
extern size_t payload_size;
extern unsigned calls_in_flight; /* On each connection, at most. */

/* ---- What a dialect tells the generator ---- */

/* What the dialect keeps for a connection. */
void **state_of(struct connection *c);

/* The connection can take calls. */
void is_ready(struct connection *c);

/* The end of what will be sent, where there is room for so many bytes, which will be sent. */
uint8_t *append(struct connection *c, size_t size);

/* A call has been answered with this message: rightly, or with a fault to complain about. Starts the next one. */
void is_answered(struct connection *c, uint64_t id, const char *fault, const uint8_t *message, size_t size);

/* Count something that is wrong; the first one is told, with the beginning of the bytes. */
void complain(const char *what, const uint8_t *bytes, size_t size);

void *allocate(size_t size);

#endif
