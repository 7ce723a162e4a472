/* zerorpc's third protocol on ZMTP 3, as a DEALER without security: an event of one frame behind an empty one.
 *
 * A request is [{"message_id": bin, "v": 3}, method, [payload]], its answer [{"response_to": message_id, ...}, "OK",
 * [payload]]. While a call lasts the server sends heartbeats for it, and gives it up if none comes back.
 *
 * ZMTP: https://rfc.zeromq.org/spec/23/
 */
#include <stdio.h>
#include <string.h>

#include "load.h"
#include "msgpack.h"

/* ---- ZMTP ---- */

#define GREETING_SIZE 64
#define VERSION_AT 10
#define MECHANISM_AT 12

enum { MORE = 1, LONG = 2, COMMAND = 4 }; /* A frame's flags. */

/* Version 3.0, mechanism NULL. */
static const uint8_t greeting[GREETING_SIZE] = "\xff\0\0\0\0\0\0\0\0\x7f\x03\0NULL";

static const uint8_t ready[] = "\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06" "DEALER";
#define READY_SIZE (sizeof ready - 1)

static size_t put_frame_header(uint8_t *to, size_t size)
{
    if (size < 256) {
        to[0] = 0;
        to[1] = (uint8_t)size;
        return 2;
    }
    to[0] = LONG;
    for (int i = 0; i < 8; i++)
        to[1 + i] = (uint8_t)((uint64_t)size >> 8 * (7 - i));
    return 9;
}

/* ---- Events ---- */

/* A message_id looks like the client's own: 32 characters, in hexadecimal. The server keeps the calls of all connections
 * in one table, so that the connection is part of it: eight digits for the call, eight for the connection.
 */
#define MESSAGE_ID_SIZE 32
#define DIGITS 8

struct state {
    enum { GREETING, HANDSHAKE, TRAFFIC } phase;
    bool has_delimiter;
    uint8_t id_end[MESSAGE_ID_SIZE - DIGITS]; /* The same in all of a connection's calls. */
};

static const uint8_t header_start[] = "\x82\xaamessage_id\xc4\x20";
#define HEADER_START_SIZE (sizeof header_start - 1)

static uint8_t *template;
static size_t request_size, message_id_at;

/* The largest header that an event of this dialect gets. */
#define HEADER_ROOM 128

static void put_digits(uint8_t *to, uint32_t number)
{
    for (int i = DIGITS; i--; number >>= 4)
        to[i] = (uint8_t)"0123456789abcdef"[number & 15];
}

static int64_t number_of(const uint8_t *digits)
{
    int64_t number = 0;
    for (int i = 0; i < DIGITS; i++) {
        const char *digit = digits[i] ? strchr("0123456789abcdef", digits[i]) : NULL;
        if (!digit)
            return -1;
        number = number << 4 | (digit - "0123456789abcdef");
    }
    return number;
}

static void prepare(void)
{
    uint8_t *body = allocate(payload_size + strlen(method) + HEADER_ROOM), *p = body;
    *p++ = 0x93;
    memcpy(p, header_start, HEADER_START_SIZE);
    p += HEADER_START_SIZE;
    size_t id_in_body = (size_t)(p - body);
    p += MESSAGE_ID_SIZE;
    memcpy(p, "\xa1v\x03", 3);
    p += 3;
    p += put_str(p, method, strlen(method));
    *p++ = 0x91;
    p += put_str(p, payload, payload_size);

    size_t size = (size_t)(p - body);
    template = allocate(size + 16);
    memcpy(template, "\x01\0", 2); /* The empty frame. */
    message_id_at = 2 + put_frame_header(template + 2, size);
    memcpy(template + message_id_at, body, size);
    request_size = message_id_at + size;
    message_id_at += id_in_body;
}

static void greet(struct connection *c)
{
    static uint32_t connections;
    struct state *state = *state_of(c) = allocate(sizeof *state);
    memset(state->id_end, '0', sizeof state->id_end);
    put_digits(state->id_end, connections++);
    memcpy(append(c, GREETING_SIZE), greeting, GREETING_SIZE);
}

static void request(struct connection *c, uint32_t id)
{
    struct state *state = *state_of(c);
    uint8_t *to = append(c, request_size);
    memcpy(to, template, request_size);
    put_digits(to + message_id_at, id);
    memcpy(to + message_id_at + DIGITS, state->id_end, sizeof state->id_end);
}

/* Tell the server that the caller is still there: [{"message_id": ..., "v": 3, "response_to": ...}, "_zpc_hb", [0]]. */
static void put_heartbeat(struct connection *c, const uint8_t *response_to)
{
    uint8_t event[2 * HEADER_ROOM], *p = event;
    p += snprintf((char *)p, sizeof event, "\x93\x83\xaamessage_id\xc4\x20%032x\xa1v\x03\xabresponse_to\xc4\x20", 0);
    memcpy(p, response_to, MESSAGE_ID_SIZE);
    p += MESSAGE_ID_SIZE;
    p += put_str(p, "_zpc_hb", 7);
    *p++ = 0x91;
    *p++ = 0;
    size_t size = (size_t)(p - event);
    uint8_t *to = append(c, 4 + size);
    memcpy(to, "\x01\0", 2);
    put_frame_header(to + 2, size);
    memcpy(to + 4, event, size);
}

/* The message_id to which this event, a complete object, is the response, or NULL; *p goes to its name. */
static const uint8_t *find_response_to(const uint8_t **p, size_t n)
{
    const uint8_t *end = *p + n, *found = NULL;
    if (*(*p)++ != 0x93 || (**p & 0xf0) != 0x80)
        return NULL;
    for (unsigned pairs = *(*p)++ & 0x0f; pairs; pairs--) {
        bool is_it = is_text(*p, "response_to", 11);
        *p += object_size(*p, (size_t)(end - *p));
        const uint8_t *value = *p;
        *p += object_size(*p, (size_t)(end - *p));
        size_t size;
        if (is_it && (found = take_text(&value, &size)) && size != MESSAGE_ID_SIZE)
            found = NULL;
    }
    return found;
}

static void take_event(struct connection *c, const uint8_t *event, size_t size)
{
    struct state *state = *state_of(c);
    const uint8_t *name = event, *response_to = NULL;
    if (size && object_size(event, size) == (ssize_t)size)
        response_to = find_response_to(&name, size);
    if (!state->has_delimiter || !response_to) {
        complain("not an event of a call: ", event, size);
        return;
    }
    if (is_text(name, "_zpc_hb", 7)) {
        put_heartbeat(c, response_to);
        return;
    }
    const char *fault = NULL;
    const uint8_t *args = name + object_size(name, size);
    if (!is_text(name, "OK", 2))
        fault = is_text(name, "ERR", 3) ? "error answer: " : "not an answer: ";
    else if (*args != 0x91 || !is_text(args + 1, payload, payload_size))
        fault = "wrong result: ";
    int64_t id = number_of(response_to);
    if (id < 0 || memcmp(response_to + DIGITS, state->id_end, sizeof state->id_end))
        complain("id that is not outstanding: ", event, size);
    else
        is_answered(c, (uint64_t)id, fault, event, size);
}

/* ---- What arrives ---- */

static ssize_t take_greeting(struct connection *c, const uint8_t *p, size_t n)
{
    struct state *state = *state_of(c);
    bool is_zmtp_3 = p[0] == 0xff && (n < 10 || p[9] == 0x7f) && (n <= VERSION_AT || p[VERSION_AT] >= 3);
    if (!is_zmtp_3 || (n >= GREETING_SIZE && strncmp((const char *)p + MECHANISM_AT, "NULL", 20))) {
        complain("not a greeting of ZMTP 3 without security: ", p, n);
        return -1;
    }
    if (n < GREETING_SIZE)
        return 0;
    memcpy(append(c, READY_SIZE), ready, READY_SIZE);
    state->phase = HANDSHAKE;
    return GREETING_SIZE;
}

static ssize_t take_command(struct connection *c, const uint8_t *p, size_t size)
{
    struct state *state = *state_of(c);
    if (size >= 6 && memcmp(p, "\5READY", 6) == 0 && state->phase == HANDSHAKE) {
        state->phase = TRAFFIC;
        is_ready(c);
    } else if (size >= 7 && size <= 7 + 16 && memcmp(p, "\4PING", 5) == 0) {
        /* Two bytes say how long the server waits, up to sixteen have to come back. */
        size_t context_size = size - 7;
        uint8_t *pong = append(c, 2 + 5 + context_size);
        pong[0] = COMMAND;
        pong[1] = (uint8_t)(5 + context_size);
        memcpy(pong + 2, "\4PONG", 5);
        memcpy(pong + 7, p + 7, context_size);
    } else {
        complain("unexpected command: ", p, size);
        return -1;
    }
    return 0;
}

static ssize_t take(struct connection *c, const uint8_t *p, size_t n)
{
    struct state *state = *state_of(c);
    if (state->phase == GREETING)
        return take_greeting(c, p, n);

    if (p[0] & ~(MORE | LONG | COMMAND)) {
        complain("not a frame: ", p, n);
        return -1;
    }
    size_t width = p[0] & LONG ? 8 : 1;
    if (n < 1 + width)
        return 0;
    uint64_t size = 0;
    for (size_t i = 1; i <= width; i++)
        size = size << 8 | p[i];
    const uint8_t *body = p + 1 + width;
    if (n - 1 - width < size)
        return 0;
    if (p[0] & COMMAND) {
        if (take_command(c, body, size) < 0)
            return -1;
    } else if (state->phase != TRAFFIC) {
        complain("an event before READY: ", body, size);
        return -1;
    } else if (p[0] & MORE) {
        state->has_delimiter = size == 0;
    } else {
        take_event(c, body, size);
        state->has_delimiter = false;
    }
    return (ssize_t)(1 + width + size);
}

const struct dialect zerorpc = {"zerorpc", prepare, greet, request, take};
