/* A closed-loop load generator for any MessagePack-RPC server that has a method `echo`.
 *
 *     load --port 4423 --connections 50 --in-flight 16 --payload-bytes 12 --warmup 0.5 --seconds 2
 *
 * Every connection keeps the same number of calls in flight: an answer is followed at once by the next request, so the
 * server is never idle and never asked for more than it can do. Every answer is checked: [1, msgid, nil, payload], with
 * a msgid that is outstanding on its connection. What was found is printed as JSON; the exit status is 0 whenever
 * something could be measured, however the server did.
 *
 * One thread with epoll and one clock reading per wake-up, so that it takes little from a server on the same core.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* When no answer at all has come for so long, those that are outstanding won't come any more. */
#define PATIENCE_NS 3000000000ull

#define MIN(a, b) ((a) < (b) ? (a) : (b))

static void fail(const char *what)
{
    perror(what);
    exit(2);
}

static void *allocate(size_t size)
{
    void *memory = calloc(1, size);
    if (!memory)
        fail("calloc");
    return memory;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec)
        + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

/* ---- Latencies: a histogram with 128 steps to each power of two, so that a percentile is exact to 0.8 %. ---- */

#define STEP_BITS 7
#define STEPS (1u << STEP_BITS)
#define BUCKETS ((64 - STEP_BITS + 1) * STEPS)

static uint64_t histogram[BUCKETS];
static uint64_t latency_count, latency_max;

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

static void add_latency(uint64_t ns)
{
    histogram[bucket_of(ns)]++;
    latency_count++;
    if (ns > latency_max)
        latency_max = ns;
}

static double percentile_us(double percent)
{
    uint64_t rank = (uint64_t)(percent / 100 * (double)latency_count + 0.5), seen = 0;
    if (rank == 0)
        rank = 1;
    for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
        seen += histogram[bucket];
        if (seen >= rank)
            return (double)MIN(middle_of(bucket), latency_max) / 1e3;
    }
    return 0;
}

/* ---- MessagePack ---- */

/* The types from 0xc0 to 0xdf: how many bytes the length field has, what one of that length stands for, and how many
 * bytes there are besides. 0xc1 is no type.
 */
enum { BYTE, ITEM, PAIR };
static const struct { uint8_t length_width, unit, rest; } layouts[32] = {
    /* c0 nil */ {0, 0, 0}, /* c1 */ {0, 0, 0}, /* c2 false */ {0, 0, 0}, /* c3 true */ {0, 0, 0},
    /* c4 bin */ {1, BYTE, 0}, {2, BYTE, 0}, {4, BYTE, 0},
    /* c7 ext */ {1, BYTE, 1}, {2, BYTE, 1}, {4, BYTE, 1},
    /* ca float */ {0, 0, 4}, {0, 0, 8},
    /* cc uint */ {0, 0, 1}, {0, 0, 2}, {0, 0, 4}, {0, 0, 8},
    /* d0 int */ {0, 0, 1}, {0, 0, 2}, {0, 0, 4}, {0, 0, 8},
    /* d4 fixext */ {0, 0, 2}, {0, 0, 3}, {0, 0, 5}, {0, 0, 9}, {0, 0, 17},
    /* d9 str */ {1, BYTE, 0}, {2, BYTE, 0}, {4, BYTE, 0},
    /* dc array */ {2, ITEM, 0}, {4, ITEM, 0},
    /* de map */ {2, PAIR, 0}, {4, PAIR, 0},
};

static uint64_t big_endian(const uint8_t *p, size_t width)
{
    uint64_t value = 0;
    while (width--)
        value = value << 8 | *p++;
    return value;
}

/* The size of the object that begins at p, of which n bytes are there: 0 if it isn't complete, -1 if it is invalid. */
static ssize_t object_size(const uint8_t *p, size_t n)
{
    size_t size = 0;
    uint64_t objects = 1; /* That have to be passed; a container adds its items. */
    for (; objects; objects--) {
        if (size >= n)
            return 0;
        uint8_t type = p[size++];
        uint64_t bytes = 0;
        if (type <= 0x7f || type >= 0xe0) { /* small int */
        } else if (type <= 0x8f) { /* small map */
            objects += 2 * (type & 0x0fu);
        } else if (type <= 0x9f) { /* small array */
            objects += type & 0x0fu;
        } else if (type <= 0xbf) { /* small str */
            bytes = type & 0x1fu;
        } else if (type == 0xc1) {
            return -1;
        } else {
            size_t width = layouts[type - 0xc0].length_width;
            if (n - size < width)
                return 0;
            uint64_t length = big_endian(p + size, width);
            size += width;
            bytes = layouts[type - 0xc0].rest;
            if (layouts[type - 0xc0].unit == BYTE)
                bytes += length;
            else
                objects += layouts[type - 0xc0].unit * length;
        }
        if (n - size < bytes)
            return 0;
        size += bytes;
    }
    return (ssize_t)size;
}

/* The unsigned integer at *p, in any width, or -1; *p goes behind it. */
static int64_t take_uint(const uint8_t **p)
{
    uint8_t type = *(*p)++;
    if (type <= 0x7f)
        return type;
    if (type < 0xcc || type > 0xce)
        return -1;
    size_t width = (size_t)1 << (type - 0xcc);
    uint64_t value = big_endian(*p, width);
    *p += width;
    return (int64_t)value;
}

/* Whether the object at p is the str, or from a peer that doesn't tell the two apart the bin, of these bytes. */
static bool is_text(const uint8_t *p, const uint8_t *text, size_t size)
{
    uint8_t type = *p++;
    uint64_t length;
    if ((type & 0xe0) == 0xa0) {
        length = type & 0x1f;
    } else if ((type >= 0xd9 && type <= 0xdb) || (type >= 0xc4 && type <= 0xc6)) {
        size_t width = layouts[type - 0xc0].length_width;
        length = big_endian(p, width);
        p += width;
    } else {
        return false;
    }
    return length == size && memcmp(p, text, size) == 0;
}

static size_t put_str(uint8_t *to, const void *text, size_t size)
{
    uint8_t *p = to;
    int width = size < 32 ? 0 : size < 0x100 ? 1 : size < 0x10000 ? 2 : 4;
    *p++ = (uint8_t)(width == 0 ? 0xa0 | size : 0xd9 + (unsigned)width / 2);
    while (width--)
        *p++ = (uint8_t)(size >> 8 * width);
    memcpy(p, text, size);
    return (size_t)(p - to) + size;
}

/* ---- State ---- */

/* One of the calls that a connection has in flight. Its msgid modulo their number is its index. */
struct call {
    uint32_t msgid;
    bool is_outstanding;
    uint64_t sent_ns;
};

struct connection {
    int fd;
    bool is_closed, is_waiting_to_write, was_answered;
    struct call *calls;
    uint8_t *in;
    size_t in_size, in_room;
    uint8_t *out; /* From out_sent to out_size it has to be sent yet. */
    size_t out_sent, out_size;
};

static int port, connection_count = 1, in_flight = 1;
static size_t payload_size = 12;
static double warmup = 0.5, seconds = 2;

static uint8_t *payload;
static uint8_t *request; /* [0, msgid, "echo", [payload]], the msgid as four bytes at an offset of 3. */
static size_t request_size;

static int epoll;
static bool is_measuring, is_stopping;
static uint64_t outstanding, answered, errors, lost_connections;
static char first_error[300]; /* Fit for JSON as it stands. */

static void note_error(const char *what, const void *bytes, size_t size)
{
    if (first_error[0])
        return;
    size_t k = (size_t)snprintf(first_error, sizeof first_error, "%s", what);
    for (size_t i = 0; i < MIN(size, 50); i++) {
        uint8_t byte = ((const uint8_t *)bytes)[i];
        bool is_plain = byte >= 32 && byte < 127 && byte != '"' && byte != '\\' && byte != '<';
        k += (size_t)snprintf(first_error + k, sizeof first_error - k, is_plain ? "%c" : "<%02x>", byte);
    }
}

/* ---- Connections ---- */

static void watch(struct connection *c, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll, operation, c->fd, &event))
        fail("epoll_ctl");
}

static void open_connection(struct connection *c)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int yes = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        fail("socket");
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address))
        fail("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    watch(c, EPOLL_CTL_ADD, EPOLLIN);

    c->calls = allocate((size_t)in_flight * sizeof *c->calls);
    for (int i = 0; i < in_flight; i++)
        c->calls[i].msgid = (uint32_t)i;
    c->in_room = payload_size + 64 * 1024;
    c->in = allocate(c->in_room);
    /* A request that isn't sent yet is outstanding, and no more than in_flight of them are. */
    c->out = allocate((size_t)in_flight * request_size);
}

static void lose_connection(struct connection *c, const char *why)
{
    note_error("connection lost: ", why, strlen(why));
    close(c->fd);
    c->is_closed = true;
    lost_connections++;
}

/* Append the request of the call to what will be sent. */
static void start_call(struct connection *c, struct call *call, uint64_t now)
{
    if (c->out_size + request_size > (size_t)in_flight * request_size) {
        c->out_size -= c->out_sent;
        memmove(c->out, c->out + c->out_sent, c->out_size);
        c->out_sent = 0;
    }
    uint8_t *to = c->out + c->out_size;
    uint32_t msgid = htonl(call->msgid);
    memcpy(to, request, request_size);
    memcpy(to + 3, &msgid, sizeof msgid);
    c->out_size += request_size;
    call->is_outstanding = true;
    call->sent_ns = now;
    outstanding++;
}

static void flush_out(struct connection *c)
{
    while (c->out_sent < c->out_size) {
        ssize_t n = send(c->fd, c->out + c->out_sent, c->out_size - c->out_sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) {
            if (!c->is_waiting_to_write)
                watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            c->is_waiting_to_write = true;
            return;
        }
        if (n < 0) {
            lose_connection(c, strerror(errno));
            return;
        }
        c->out_sent += (size_t)n;
    }
    c->out_sent = c->out_size = 0;
    if (c->is_waiting_to_write)
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
    c->is_waiting_to_write = false;
}

/* One complete message has arrived: check it, and go on with the next call. */
static void take_answer(struct connection *c, const uint8_t *message, size_t size, uint64_t now)
{
    const uint8_t *p = message;
    int64_t msgid = -1;
    if (*p++ == 0x94 && *p++ == 0x01)
        msgid = take_uint(&p);
    struct call *call = msgid < 0 ? NULL : &c->calls[msgid % in_flight];
    if (!call || call->msgid != msgid || !call->is_outstanding) {
        errors++;
        note_error(call ? "msgid that is not outstanding: " : "not a response: ", message, size);
        return;
    }
    call->is_outstanding = false;
    outstanding--;
    answered++;
    c->was_answered = true;
    if (*p != 0xc0) {
        errors++;
        note_error("error answer: ", message, size);
    } else if (!is_text(p + 1, payload, payload_size)) {
        errors++;
        note_error("wrong result: ", message, size);
    } else if (is_measuring) {
        add_latency(now - call->sent_ns);
    }
    if (!is_stopping) {
        call->msgid += (uint32_t)in_flight; /* It would take hours of one run to wrap. */
        start_call(c, call, now);
    }
}

static void on_readable(struct connection *c)
{
    if (c->in_size == c->in_room) { /* One message fills it all; it can't be the right one. */
        c->in_room *= 2;
        c->in = realloc(c->in, c->in_room);
        if (!c->in)
            fail("realloc");
    }
    /* Only once: what is left over makes the descriptor readable again. */
    ssize_t n = recv(c->fd, c->in + c->in_size, c->in_room - c->in_size, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        lose_connection(c, n ? strerror(errno) : "closed by the server");
        return;
    }
    c->in_size += (size_t)n;

    uint64_t now = now_ns();
    size_t done = 0;
    ssize_t size;
    while ((size = object_size(c->in + done, c->in_size - done)) > 0) {
        take_answer(c, c->in + done, (size_t)size, now);
        done += (size_t)size;
    }
    if (size < 0) {
        errors++;
        note_error("not MessagePack: ", c->in + done, c->in_size - done);
        lose_connection(c, "out of step");
        return;
    }
    c->in_size -= done;
    memmove(c->in, c->in + done, c->in_size);
    /* The requests that these answers made room for leave together, as a client with work to do would send them. */
    if (!c->is_waiting_to_write)
        flush_out(c);
}

/* ---- The run ---- */

static void parse_options(int argc, char **argv)
{
    static const struct option options[] = {
        {"port", required_argument, NULL, 'p'},          {"connections", required_argument, NULL, 'c'},
        {"in-flight", required_argument, NULL, 'i'},     {"payload-bytes", required_argument, NULL, 'b'},
        {"warmup", required_argument, NULL, 'w'},        {"seconds", required_argument, NULL, 's'},
        {NULL, 0, NULL, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'c': connection_count = atoi(optarg); break;
        case 'i': in_flight = atoi(optarg); break;
        case 'b': payload_size = strtoul(optarg, NULL, 10); break;
        case 'w': warmup = atof(optarg); break;
        case 's': seconds = atof(optarg); break;
        default: exit(2);
        }
    }
    if (port < 1 || connection_count < 1 || in_flight < 1 || optind < argc) {
        fprintf(stderr, "usage: load --port P [--connections C] [--in-flight N] [--payload-bytes B] [--warmup S] "
                        "[--seconds S]\n");
        exit(2);
    }
}

static void build_request(void)
{
    payload = allocate(payload_size + 1);
    for (size_t i = 0; i < payload_size; i++)
        payload[i] = (uint8_t)('a' + i % 26);
    request = allocate(payload_size + 64);
    memcpy(request, "\x94\x00\xce\0\0\0\0", 7);
    request_size = 7;
    request_size += put_str(request + request_size, "echo", 4);
    request[request_size++] = 0x91;
    request_size += put_str(request + request_size, payload, payload_size);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    build_request();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        fail("epoll_create1");
    struct connection *connections = allocate((size_t)connection_count * sizeof *connections);
    for (int i = 0; i < connection_count; i++)
        open_connection(&connections[i]);

    uint64_t now = now_ns();
    uint64_t warm_ns = now + (uint64_t)(warmup * 1e9);
    uint64_t begin_ns = 0, end_ns = 0, last_answer_ns = now, answered_before = 0;
    double cpu_begin = 0, cpu_end = 0;
    for (int i = 0; i < connection_count; i++) {
        for (int k = 0; k < in_flight; k++)
            start_call(&connections[i], &connections[i].calls[k], now);
        flush_out(&connections[i]);
    }

    /* Warm up, measure, then let what is in flight come home. */
    while (outstanding && lost_connections < (uint64_t)connection_count && now - last_answer_ns < PATIENCE_NS) {
        struct epoll_event events[256];
        int n = epoll_wait(epoll, events, 256, 100);
        if (n < 0 && errno != EINTR)
            fail("epoll_wait");
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (events[i].events & EPOLLOUT)
                flush_out(c);
            if (!c->is_closed && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                on_readable(c);
        }
        now = now_ns();
        if (answered != answered_before) {
            answered_before = answered;
            last_answer_ns = now;
        }
        if (!begin_ns && now >= warm_ns) {
            is_measuring = true;
            begin_ns = now;
            cpu_begin = cpu_seconds();
        } else if (is_measuring && now >= begin_ns + (uint64_t)(seconds * 1e9) && latency_count) {
            is_measuring = false;
            is_stopping = true;
            end_ns = now;
            cpu_end = cpu_seconds();
        }
    }

    /* A run that was given up early has been measured for less than it should, or not at all. */
    if (begin_ns && !end_ns) {
        end_ns = now;
        cpu_end = cpu_seconds();
    }
    double elapsed = (double)(end_ns - begin_ns) / 1e9;
    int silent_connections = 0;
    for (int i = 0; i < connection_count; i++)
        silent_connections += !connections[i].was_answered;
    printf("{\"seconds\": %.6f, \"calls\": %llu, \"calls_per_second\": %.1f, "
           "\"p50_us\": %.2f, \"p99_us\": %.2f, \"p99.9_us\": %.2f, \"max_us\": %.2f, "
           "\"errors\": %llu, \"unanswered\": %llu, \"lost_connections\": %llu, \"silent_connections\": %d, "
           "\"is_complete\": %s, \"generator_cpu\": %.3f, \"first_error\": \"%s\"}\n",
        elapsed, (unsigned long long)latency_count, elapsed > 0 ? (double)latency_count / elapsed : 0,
        percentile_us(50), percentile_us(99), percentile_us(99.9), (double)latency_max / 1e3,
        (unsigned long long)errors, (unsigned long long)outstanding, (unsigned long long)lost_connections,
        silent_connections, is_stopping ? "true" : "false", elapsed > 0 ? (cpu_end - cpu_begin) / elapsed : 0,
        first_error);
    return 0;
}
