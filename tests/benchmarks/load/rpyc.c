/* RPyC's protocol, as one who fetches a method of the root object once and then calls it.
 *
 * A frame is the size of its data, whether they are compressed, the data and a line feed. The data are the kind of the
 * message and, in a serialization called brine, (seq, (handler, args)) or (seq, result), where every value has a label:
 * a value, a tuple of labelled values, or a reference to one's own or to the other's object.
 *
 * It compresses nothing: a server takes both. Servers compress answers of more than 3,000 bytes.
 */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "load.h"

#define HEADER_SIZE 5
#define FLUSHER '\n' /* Behind the data, not counted as their size. */

/* What small integers look like, and tags of brine. */
#define INT(value) ((uint8_t)(0x50 + (value)))
enum { UNICODE = 0x08, INT_OF_DIGITS = 0x16 };
enum { EMPTY_TUPLE = 0x02, TUPLE_OF_1 = 0x10, TUPLE_OF_2, TUPLE_OF_3 };

enum { REQUEST = 1, REPLY, EXCEPTION };
enum { VALUE = 1, TUPLE, LOCAL_REF, REMOTE_REF };
enum { GETROOT = 3, GETATTR = 4, CALL = 7 };

/* The seq of a call has always this many digits: it is the id and this. */
#define SEQ_DIGITS 8
#define FIRST_SEQ 10000000

/* A reference to an object: its class's name, and two addresses. */
#define REFERENCE_ROOM 300

struct state {
    enum { WANTS_ROOT, WANTS_METHOD, CALLS } phase;
    uint8_t request_start[REFERENCE_ROOM + 64]; /* It has the reference to the method, which is the connection's own. */
    size_t request_start_size, digits_at;
};

static uint8_t *request_end, *right_end; /* In a right answer, what is behind the seq. */
static size_t request_end_size, right_end_size;

static size_t put_bytes(uint8_t *to, const void *bytes, size_t size)
{
    size_t k = 0;
    if (size <= 4) {
        to[k++] = (uint8_t)(size == 0 ? 0x01 : 0x0a + size - 1);
    } else if (size < 256) {
        to[k++] = 0x0e;
        to[k++] = (uint8_t)size;
    } else {
        uint32_t length = htonl((uint32_t)size);
        to[k++] = 0x0f;
        memcpy(to + k, &length, sizeof length);
        k += sizeof length;
    }
    memcpy(to + k, bytes, size);
    return k + size;
}

static void put_header(uint8_t *to, size_t data_size)
{
    uint32_t size = htonl((uint32_t)data_size);
    memcpy(to, &size, sizeof size);
    to[4] = 0;
}

static void send_data(struct connection *c, const uint8_t *data, size_t size)
{
    uint8_t *to = append(c, HEADER_SIZE + size + 1);
    put_header(to, size);
    memcpy(to + HEADER_SIZE, data, size);
    to[HEADER_SIZE + size] = FLUSHER;
}

static void prepare(void)
{
    static const uint8_t value[] = {TUPLE_OF_2, INT(VALUE)};

    uint8_t *p = request_end = allocate(payload_size + 64);
    memcpy(p, value, sizeof value);
    p += sizeof value;
    *p++ = TUPLE_OF_1; /* The arguments. */
    *p++ = UNICODE;
    p += put_bytes(p, payload, payload_size);
    memcpy(p, value, sizeof value);
    p += sizeof value;
    *p++ = EMPTY_TUPLE; /* The keyword arguments. */
    *p++ = FLUSHER;
    request_end_size = (size_t)(p - request_end);

    p = right_end = allocate(payload_size + 64);
    memcpy(p, value, sizeof value);
    p += sizeof value;
    *p++ = UNICODE;
    p += put_bytes(p, payload, payload_size);
    right_end_size = (size_t)(p - right_end);
}

static void greet(struct connection *c)
{
    static const uint8_t get_root[] = {REQUEST, TUPLE_OF_2, INT(0),  TUPLE_OF_2,
                                       INT(GETROOT), TUPLE_OF_2, INT(VALUE), EMPTY_TUPLE};
    *state_of(c) = allocate(sizeof(struct state));
    send_data(c, get_root, sizeof get_root);
}

static void ask_for_method(struct connection *c, const uint8_t *root, size_t root_size)
{
    static const uint8_t start[] = {REQUEST, TUPLE_OF_2, INT(1), TUPLE_OF_2, INT(GETATTR), TUPLE_OF_2,
                                    INT(TUPLE), TUPLE_OF_2, TUPLE_OF_2, INT(LOCAL_REF)};
    static const uint8_t name[] = {TUPLE_OF_2, INT(VALUE), UNICODE};
    uint8_t *data = allocate(sizeof start + root_size + sizeof name + strlen(method) + 5), *p = data;
    memcpy(p, start, sizeof start);
    p += sizeof start;
    memcpy(p, root, root_size);
    p += root_size;
    memcpy(p, name, sizeof name);
    p += sizeof name;
    p += put_bytes(p, method, strlen(method));
    send_data(c, data, (size_t)(p - data));
    free(data);
}

static void build_request(struct state *state, const uint8_t *function, size_t function_size)
{
    static const uint8_t before_digits[] = {REQUEST, TUPLE_OF_2, INT_OF_DIGITS, SEQ_DIGITS};
    static const uint8_t behind_digits[] = {TUPLE_OF_2, INT(CALL), TUPLE_OF_2, INT(TUPLE), TUPLE_OF_3,
                                            TUPLE_OF_2, INT(LOCAL_REF)};
    uint8_t *p = state->request_start + HEADER_SIZE;
    memcpy(p, before_digits, sizeof before_digits);
    p += sizeof before_digits;
    state->digits_at = (size_t)(p - state->request_start);
    p += SEQ_DIGITS;
    memcpy(p, behind_digits, sizeof behind_digits);
    p += sizeof behind_digits;
    memcpy(p, function, function_size);
    p += function_size;
    state->request_start_size = (size_t)(p - state->request_start);
    put_header(state->request_start, state->request_start_size - HEADER_SIZE + request_end_size - 1);
}

static void request(struct connection *c, uint32_t id)
{
    struct state *state = *state_of(c);
    uint8_t *to = append(c, state->request_start_size + request_end_size);
    memcpy(to, state->request_start, state->request_start_size);
    memcpy(to + state->request_start_size, request_end, request_end_size);
    uint32_t seq = FIRST_SEQ + id;
    for (size_t i = SEQ_DIGITS; i--; seq /= 10)
        to[state->digits_at + i] = (uint8_t)('0' + seq % 10);
}

/* ---- What arrives ---- */

/* The data of a compressed frame, or NULL; *size becomes theirs. zlib is asked for only when it is needed. */
static const uint8_t *decompressed(const uint8_t *data, size_t *size)
{
    static int (*uncompress)(uint8_t *, unsigned long *, const uint8_t *, unsigned long);
    static uint8_t *room;
    unsigned long room_size = payload_size + 64 * 1024; /* There is room for a traceback, too. */
    if (!uncompress) {
        void *zlib = dlopen("libz.so.1", RTLD_NOW);
        if (zlib)
            *(void **)&uncompress = dlsym(zlib, "uncompress");
        if (!uncompress) {
            fprintf(stderr, "load: the server compresses: %s\n", dlerror());
            exit(2);
        }
        room = allocate(room_size);
    }
    if (uncompress(room, &room_size, data, *size))
        return NULL;
    *size = room_size;
    return room;
}

/* The seq at *p, before end, or -1; *p goes behind it. */
static int64_t take_seq(const uint8_t **p, const uint8_t *end)
{
    if (*p < end && **p >= INT(0) && **p <= INT(0x9f))
        return *(*p)++ - INT(0);
    if (end - *p < 2 || **p != INT_OF_DIGITS || end - *p - 2 < (*p)[1] || (*p)[1] > 18)
        return -1;
    int64_t seq = 0;
    size_t digits = (*p)[1];
    for (*p += 2; digits; digits--, ++*p) {
        if (**p < '0' || **p > '9')
            return -1;
        seq = seq * 10 + **p - '0';
    }
    return seq;
}

/* Take the references that come before calls; -1 if this isn't one. */
static int take_reference(struct connection *c, int64_t seq, const uint8_t *result, size_t size)
{
    struct state *state = *state_of(c);
    static const uint8_t start[] = {TUPLE_OF_2, INT(REMOTE_REF)};
    bool is_reference = size > sizeof start && memcmp(result, start, sizeof start) == 0
        && size - sizeof start <= REFERENCE_ROOM && seq == (state->phase == WANTS_ROOT ? 0 : 1);
    if (!is_reference)
        return -1;
    const uint8_t *reference = result + sizeof start;
    if (state->phase == WANTS_ROOT) {
        ask_for_method(c, reference, size - sizeof start);
        state->phase = WANTS_METHOD;
    } else {
        build_request(state, reference, size - sizeof start);
        state->phase = CALLS;
        is_ready(c);
    }
    return 0;
}

static ssize_t take(struct connection *c, const uint8_t *p, size_t n)
{
    struct state *state = *state_of(c);
    if (n < HEADER_SIZE)
        return 0;
    uint32_t length;
    memcpy(&length, p, sizeof length);
    size_t size = ntohl(length), frame_size = HEADER_SIZE + size + 1;
    if (p[4] > 1) {
        complain("not a frame: ", p, n);
        return -1;
    }
    if (n < frame_size)
        return 0;
    const uint8_t *frame = p, *data = p + HEADER_SIZE;
    if (frame[frame_size - 1] != FLUSHER || (frame[4] && !(data = decompressed(data, &size)))) {
        complain("not a frame: ", frame, frame_size);
        return -1;
    }

    const uint8_t *end = data + size;
    p = data;
    int64_t seq = -1;
    if (size >= 2 && (p[0] == REPLY || p[0] == EXCEPTION) && p[1] == TUPLE_OF_2) {
        p += 2;
        seq = take_seq(&p, end);
    }
    size_t result_size = (size_t)(end - p);
    if (seq < 0) {
        complain("not an answer: ", data, size);
        if (state->phase != CALLS)
            return -1;
    } else if (state->phase != CALLS) {
        if (data[0] != REPLY || take_reference(c, seq, p, result_size)) {
            complain("no reference to the method: ", data, size);
            return -1;
        }
    } else if (seq < FIRST_SEQ) {
        complain("id that is not outstanding: ", data, size);
    } else {
        const char *fault = NULL;
        if (data[0] == EXCEPTION)
            fault = "error answer: ";
        else if (result_size != right_end_size || memcmp(p, right_end, right_end_size))
            fault = "wrong result: ";
        is_answered(c, (uint64_t)seq - FIRST_SEQ, fault, data, size);
    }
    return (ssize_t)frame_size;
}

const struct dialect rpyc = {"rpyc", prepare, greet, request, take};
