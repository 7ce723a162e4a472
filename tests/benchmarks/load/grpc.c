/* gRPC: unary calls of /Echo/METHOD on HTTP/2 without TLS, with prior knowledge, whose message is the payload as bytes.
 *
 * A call is a stream: headers and the message as data from here, headers, the message and headers with a status from
 * there. The headers of the first call on a connection are such that all others can refer to them, as clients do it.
 *
 * HTTP/2: RFC 9113. gRPC: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
 */
#include <arpa/inet.h>
#include <string.h>

#include "hpack.h"
#include "load.h"

#define FRAME_HEADER_SIZE 9

enum { DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION };
enum { ACK = 0x01, END_STREAM = 0x01, END_HEADERS = 0x04, PADDED = 0x08, HAS_PRIORITY = 0x20 }; /* Flags. */
enum { CANCEL = 8 }; /* Why a stream is reset. */
enum { SET_HEADER_TABLE_SIZE = 1, SET_MAX_STREAMS = 3, SET_INITIAL_WINDOW = 4, SET_MAX_FRAME = 5 };

/* What the server may do: as large frames as grpcio's own client allows, a message in flight without asking. Of a
 * connection's window, a part is given back when it has been used up.
 */
#define MAX_FRAME 4194304
#define STREAM_WINDOW 0x7fffffff
#define CONNECTION_WINDOW 0x1000000
#define GIVEN_BACK 0x100000

/* What is so until the server says otherwise. */
#define DEFAULT_WINDOW 65535
#define DEFAULT_MAX_FRAME 16384

/* A call, at its id modulo the calls in flight. */
struct stream {
    uint32_t number; /* Of the stream, 0 if there is none. */
    uint32_t id;
    int64_t window;
    size_t sent, received; /* Of the message. */
    bool is_wrong;
};

struct state {
    bool has_settings, has_sent_headers;
    uint32_t next_number;
    /* What the server allows. */
    int64_t window, initial_window;
    uint32_t max_frame, max_streams;
    /* Of the connection's window, since something was given back. */
    uint32_t used;
    struct stream *streams;
    uint32_t open_streams, last_found;
    /* Calls that have to be sent yet, a ring: the first of them may have begun. */
    struct stream **waiting;
    uint32_t first_waiting, waiting_count;
    struct header_table table;
};

static uint8_t *message; /* Not compressed, its size, the payload. */
static size_t message_size;
static uint8_t *first_headers;
static size_t first_headers_size;

/* :method POST and :scheme http, which are static, and the four that the server remembers, from the oldest on. */
static const uint8_t headers[] = {0x83, 0x86, 0xc1, 0xc0, 0xbf, 0xbe};

/* The beginning of the first message that is wrong, for the report. */
static uint8_t wrong[50];
static size_t wrong_size;

static uint32_t number_at(const uint8_t *p)
{
    uint32_t number;
    memcpy(&number, p, sizeof number);
    return ntohl(number);
}

static uint8_t *put_number(uint8_t *to, uint32_t number)
{
    number = htonl(number);
    memcpy(to, &number, sizeof number);
    return to + sizeof number;
}

/* Append a frame; returns where its payload belongs. */
static uint8_t *append_frame(struct connection *c, uint8_t type, uint8_t flags, uint32_t stream, size_t size)
{
    uint8_t *to = append(c, FRAME_HEADER_SIZE + size);
    to = put_number(to, (uint32_t)size << 8 | type);
    *to++ = flags;
    return put_number(to, stream);
}

static void prepare(void)
{
    message_size = 5 + payload_size;
    message = allocate(message_size);
    put_number(message + 1, (uint32_t)payload_size);
    memcpy(message + 5, payload, payload_size);

    static const char service[] = "/Echo/";
    char *path = allocate(sizeof service + strlen(method));
    strcat(strcpy(path, service), method);
    uint8_t *p = first_headers = allocate(strlen(path) + 256);
    memcpy(p, headers, 2);
    p += 2;
    p += put_header_to_remember(p, ":path", path);
    p += put_header_to_remember(p, ":authority", "127.0.0.1");
    p += put_header_to_remember(p, "te", "trailers");
    p += put_header_to_remember(p, "content-type", "application/grpc");
    first_headers_size = (size_t)(p - first_headers);
}

static void greet(struct connection *c)
{
    static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    struct state *state = *state_of(c) = allocate(sizeof *state);
    state->next_number = 1;
    state->window = state->initial_window = DEFAULT_WINDOW;
    state->max_frame = DEFAULT_MAX_FRAME;
    state->max_streams = UINT32_MAX;
    state->streams = allocate(calls_in_flight * sizeof *state->streams);
    state->waiting = allocate(calls_in_flight * sizeof *state->waiting);
    init_header_table(&state->table);

    memcpy(append(c, sizeof preface - 1), preface, sizeof preface - 1);
    uint8_t *p = append_frame(c, SETTINGS, 0, 0, 3 * 6);
    static const struct { uint8_t what; uint32_t value; } settings[] = {
        {SET_MAX_STREAMS, 0}, {SET_INITIAL_WINDOW, STREAM_WINDOW}, {SET_MAX_FRAME, MAX_FRAME},
    };
    for (int i = 0; i < 3; i++) {
        *p++ = 0;
        *p++ = settings[i].what;
        p = put_number(p, settings[i].value);
    }
    put_number(append_frame(c, WINDOW_UPDATE, 0, 0, 4), CONNECTION_WINDOW - DEFAULT_WINDOW);
}

/* ---- Requests ---- */

static void open_stream(struct connection *c, struct state *state, struct stream *stream)
{
    stream->number = state->next_number;
    stream->window = state->initial_window;
    stream->sent = stream->received = 0;
    stream->is_wrong = false;
    state->next_number += 2;
    state->open_streams++;
    if (state->has_sent_headers)
        memcpy(append_frame(c, HEADERS, END_HEADERS, stream->number, sizeof headers), headers, sizeof headers);
    else
        memcpy(append_frame(c, HEADERS, END_HEADERS, stream->number, first_headers_size), first_headers,
               first_headers_size);
    state->has_sent_headers = true;
}

/* Send what the server has room for. Calls go one after the other: if one of them can't, those behind it wait. */
static void send_waiting(struct connection *c, struct state *state)
{
    while (state->waiting_count) {
        struct stream *stream = state->waiting[state->first_waiting];
        if (!stream->number) {
            if (state->open_streams >= state->max_streams)
                return;
            open_stream(c, state, stream);
        }
        while (stream->sent < message_size) {
            int64_t window = MIN(stream->window, state->window);
            if (window <= 0)
                return;
            size_t size = MIN(message_size - stream->sent, MIN((size_t)window, state->max_frame));
            bool is_last = stream->sent + size == message_size;
            memcpy(append_frame(c, DATA, is_last ? END_STREAM : 0, stream->number, size), message + stream->sent, size);
            stream->sent += size;
            stream->window -= (int64_t)size;
            state->window -= (int64_t)size;
        }
        state->first_waiting = (state->first_waiting + 1) % calls_in_flight;
        state->waiting_count--;
    }
}

static void request(struct connection *c, uint32_t id)
{
    struct state *state = *state_of(c);
    struct stream *stream = &state->streams[id % calls_in_flight];
    stream->id = id;
    state->waiting[(state->first_waiting + state->waiting_count++) % calls_in_flight] = stream;
    send_waiting(c, state);
}

/* ---- Answers ---- */

/* The open stream of this number, or NULL. Most often it is the one behind the last that was looked for. */
static struct stream *find_stream(struct state *state, uint32_t number)
{
    uint32_t at = state->last_found;
    for (uint32_t i = 0; i < calls_in_flight && number; i++) {
        if (state->streams[at].number == number) {
            state->last_found = at;
            return &state->streams[at];
        }
        at = at + 1 == calls_in_flight ? 0 : at + 1;
    }
    return NULL;
}

/* Don't send the rest of a message that isn't sent yet, which is then the first of those that wait. */
static bool abandon(struct state *state, struct stream *stream)
{
    if (stream->sent == message_size)
        return false;
    stream->sent = message_size;
    state->first_waiting = (state->first_waiting + 1) % calls_in_flight;
    state->waiting_count--;
    return true;
}

static void end_stream(struct connection *c, struct stream *stream, const char *fault, const uint8_t *bytes, size_t size)
{
    struct state *state = *state_of(c);
    if (!fault && (stream->is_wrong || stream->received != message_size)) {
        fault = "wrong result: ";
        bytes = stream->is_wrong ? wrong : (const uint8_t *)"too short";
        size = stream->is_wrong ? wrong_size : strlen("too short");
    }
    if (abandon(state, stream))
        put_number(append_frame(c, RST_STREAM, 0, stream->number, 4), CANCEL);
    stream->number = 0;
    state->open_streams--;
    is_answered(c, stream->id, fault, bytes, size);
    send_waiting(c, state);
}

static int take_data(struct connection *c, uint32_t number, uint8_t flags, const uint8_t *data, size_t size)
{
    struct state *state = *state_of(c);
    struct stream *stream = find_stream(state, number);
    if (!stream) {
        complain("id that is not outstanding: ", data, size);
        return 0;
    }
    size_t rest = message_size - stream->received;
    if (!stream->is_wrong && (size > rest || memcmp(data, message + stream->received, size))) {
        stream->is_wrong = true;
        if (!wrong_size) {
            wrong_size = MIN(size, sizeof wrong);
            memcpy(wrong, data, wrong_size);
        }
    }
    stream->received += stream->is_wrong ? 0 : size;
    if (flags & END_STREAM)
        end_stream(c, stream, "an end without a status: ", data, size);
    return 0;
}

static int take_header_block(struct connection *c, uint32_t number, uint8_t flags, const uint8_t *block, size_t size)
{
    struct state *state = *state_of(c);
    static const char *const faults[] = {
        [NO_STATUS] = "an end without a status: ", [STATUS_OK] = NULL, [STATUS_ERROR] = "error answer: ",
    };
    enum grpc_status status = take_headers(&state->table, block, size);
    if (status == BAD_HEADERS || !(flags & END_HEADERS)) {
        complain("headers that can't be followed: ", block, size);
        return -1;
    }
    struct stream *stream = find_stream(state, number);
    if (!stream)
        complain("id that is not outstanding: ", block, size);
    else if (flags & END_STREAM)
        end_stream(c, stream, faults[status], block, size);
    return 0;
}

/* ---- What else arrives ---- */

static int take_settings(struct connection *c, uint8_t flags, const uint8_t *p, size_t size)
{
    struct state *state = *state_of(c);
    if (flags & ACK)
        return 0;
    for (; size >= 6; p += 6, size -= 6) {
        uint32_t value = number_at(p + 2);
        switch (p[0] << 8 | p[1]) {
        case SET_HEADER_TABLE_SIZE:
            if (value < HEADER_TABLE_SIZE) { /* The headers of calls are in it already, or will be. */
                complain("too small a table of headers: ", p, 6);
                return -1;
            }
            break;
        case SET_MAX_STREAMS: state->max_streams = value; break;
        case SET_INITIAL_WINDOW:
            for (unsigned i = 0; i < calls_in_flight; i++)
                state->streams[i].window += (int64_t)value - state->initial_window;
            state->initial_window = value;
            break;
        case SET_MAX_FRAME:
            if (value < DEFAULT_MAX_FRAME || value >= 1 << 24) {
                complain("impossible size of frames: ", p, 6);
                return -1;
            }
            state->max_frame = value;
            break;
        }
    }
    append_frame(c, SETTINGS, ACK, 0, 0);
    if (!state->has_settings) {
        state->has_settings = true;
        is_ready(c);
    }
    send_waiting(c, state);
    return 0;
}

static void take_window_update(struct connection *c, uint32_t number, uint32_t increment)
{
    struct state *state = *state_of(c);
    struct stream *stream = find_stream(state, number);
    if (number == 0)
        state->window += increment;
    else if (stream)
        stream->window += increment;
    send_waiting(c, state);
}

/* The server may use so many bytes again, once there are enough of them. */
static void give_back(struct connection *c, size_t size)
{
    struct state *state = *state_of(c);
    state->used += (uint32_t)size;
    if (state->used < GIVEN_BACK)
        return;
    put_number(append_frame(c, WINDOW_UPDATE, 0, 0, 4), state->used);
    state->used = 0;
}

static int take_frame(struct connection *c, const uint8_t *frame, size_t size)
{
    struct state *state = *state_of(c);
    const uint8_t *p = frame + FRAME_HEADER_SIZE;
    uint8_t type = frame[3], flags = frame[4];
    uint32_t number = number_at(frame + 5) & 0x7fffffff;
    if (type == DATA)
        give_back(c, size);
    if (type == DATA || type == HEADERS) {
        size_t padding = 0, priority_size = type == HEADERS && flags & HAS_PRIORITY ? 5 : 0;
        if (flags & PADDED && size) {
            padding = *p++;
            size--;
        }
        if (size < padding + priority_size || (flags & PADDED && p == frame + FRAME_HEADER_SIZE)) {
            complain("not a frame: ", frame, FRAME_HEADER_SIZE);
            return -1;
        }
        p += priority_size;
        size -= padding + priority_size;
    }
    bool has_right_size = type == RST_STREAM || type == WINDOW_UPDATE ? size == 4
        : type == PING                                               ? size == 8
        : type == SETTINGS                                           ? size % 6 == 0
                                                                     : true;
    if (!has_right_size || (!state->has_settings && type != SETTINGS)) {
        complain("not a frame: ", frame, FRAME_HEADER_SIZE + size);
        return -1;
    }
    struct stream *stream;
    switch (type) {
    case DATA: return take_data(c, number, flags, p, size);
    case HEADERS: return take_header_block(c, number, flags, p, size);
    case SETTINGS: return take_settings(c, flags, p, size);
    case RST_STREAM: /* It may also come behind an answer. */
        if ((stream = find_stream(state, number))) {
            abandon(state, stream);
            end_stream(c, stream, "stream reset: ", frame, FRAME_HEADER_SIZE + size);
        }
        return 0;
    case PING:
        if (!(flags & ACK))
            memcpy(append_frame(c, PING, ACK, 0, 8), p, 8);
        return 0;
    case WINDOW_UPDATE: take_window_update(c, number, number_at(p) & 0x7fffffff); return 0;
    case GOAWAY:
    case PUSH_PROMISE:
    case CONTINUATION: complain("unexpected frame: ", frame, FRAME_HEADER_SIZE + size); return -1;
    default: return 0; /* Who doesn't know a type has to ignore it. */
    }
}

static ssize_t take(struct connection *c, const uint8_t *p, size_t n)
{
    if (n < FRAME_HEADER_SIZE)
        return 0;
    size_t size = number_at(p) >> 8;
    if (size > MAX_FRAME) {
        complain("not a frame: ", p, n);
        return -1;
    }
    if (n - FRAME_HEADER_SIZE < size)
        return 0;
    return take_frame(c, p, size) < 0 ? -1 : (ssize_t)(FRAME_HEADER_SIZE + size);
}

const struct dialect grpc = {"grpc", prepare, greet, request, take};
