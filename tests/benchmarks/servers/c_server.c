/* A server of MessagePack-RPC for measuring clients: its only method, `echo`, answers with its only param. It outruns
 * every client in Python by far.
 *
 * Unlike c_echo.c it reads what it gets, since clients differ: msgids grow from one byte to five, a method's name may
 * be a str of the old kind or of the new, requests come one by one or many at once. Msgid and payload go back byte for
 * byte. Another method is answered with an error; whatever is no request ends the connection.
 *
 * Like every server in this directory it prints the port on which it listens.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* A request has to fit. */
#define ROOM (1024 * 1024)

static const char no_such_method[] = "no such method";

struct connection {
    int fd;
    size_t in_size;
    uint8_t in[ROOM];
};

/* One for all: what is answered is sent before anybody else is read. A request has six bytes at least, and no answer is
 * longer than its request by more than an error has text.
 */
static uint8_t out[ROOM + ROOM / 6 * sizeof no_such_method];

static void fail(const char *what)
{
    perror(what);
    exit(2);
}

/* Bytes that are read from the front. It has run out when more was asked for than there is. */
struct reader {
    const uint8_t *at, *end;
    bool has_run_out, is_invalid;
};

static const uint8_t *take(struct reader *r, uint64_t size)
{
    const uint8_t *at = r->at;
    if (size > (uint64_t)(r->end - at)) {
        r->has_run_out = true;
        r->at = r->end;
        return NULL;
    }
    r->at += size;
    return at;
}

static uint64_t take_number(struct reader *r, unsigned width)
{
    const uint8_t *p = take(r, width);
    uint64_t number = 0;
    while (p && width--)
        number = number << 8 | *p++;
    return number;
}

/* The header of the next object: how many bytes follow that belong to it, and how many objects. */
struct header {
    enum { NUMBER, TEXT, ARRAY, OTHER } kind;
    uint64_t bytes, objects;
};

static struct header take_header(struct reader *r)
{
    struct header h = {OTHER, 0, 0};
    const uint8_t *first = take(r, 1);
    uint8_t type = first ? *first : 0;
    if (type <= 0x7f) {
        h.kind = NUMBER;
    } else if (type <= 0x8f) {
        h.objects = 2 * (type & 0x0fu);
    } else if (type <= 0x9f) {
        h.kind = ARRAY;
        h.objects = type & 0x0fu;
    } else if (type <= 0xbf) {
        h.kind = TEXT;
        h.bytes = type & 0x1fu;
    } else if (type < 0xe0) {
        switch (type) {
        case 0xc0: case 0xc2: case 0xc3: break;
        case 0xc4: case 0xc5: case 0xc6: h.kind = TEXT; h.bytes = take_number(r, 1u << (type - 0xc4)); break;
        case 0xc7: case 0xc8: case 0xc9: h.bytes = 1 + take_number(r, 1u << (type - 0xc7)); break;
        case 0xca: case 0xcb: h.bytes = 4u << (type - 0xca); break;
        case 0xcc: case 0xcd: case 0xce: h.kind = NUMBER; h.bytes = 1u << (type - 0xcc); break;
        case 0xcf: h.bytes = 8; break;
        case 0xd0: case 0xd1: case 0xd2: case 0xd3: h.bytes = 1u << (type - 0xd0); break;
        case 0xd4: case 0xd5: case 0xd6: case 0xd7: case 0xd8: h.bytes = 1 + (1u << (type - 0xd4)); break;
        case 0xd9: case 0xda: case 0xdb: h.kind = TEXT; h.bytes = take_number(r, 1u << (type - 0xd9)); break;
        case 0xdc: case 0xdd: h.kind = ARRAY; h.objects = take_number(r, 2u << (type - 0xdc)); break;
        case 0xde: case 0xdf: h.objects = 2 * take_number(r, 2u << (type - 0xde)); break;
        default: r->is_invalid = true;
        }
    }
    return h;
}

/* Pass over a whole object. */
static void skip(struct reader *r)
{
    for (uint64_t objects = 1; objects && !r->has_run_out && !r->is_invalid; objects--) {
        struct header h = take_header(r);
        take(r, h.bytes);
        objects += h.objects;
    }
}

static uint8_t *put(uint8_t *to, const void *bytes, size_t size)
{
    memcpy(to, bytes, size);
    return to + size;
}

/* Put the answer to the request [0, msgid, method, [param]] that r is in front of; returns where the next one goes. What
 * it puts for a request that isn't all there, or is none, has no meaning.
 */
static uint8_t *answer(struct reader *r, uint8_t *to)
{
    const uint8_t *request = r->at;
    struct header h = take_header(r);
    r->is_invalid |= request < r->end && (h.kind != ARRAY || h.objects != 4);
    const uint8_t *kind = take(r, 1);
    r->is_invalid |= kind && *kind != 0;

    const uint8_t *msgid = r->at;
    h = take_header(r);
    r->is_invalid |= !r->has_run_out && h.kind != NUMBER;
    take(r, h.bytes);
    size_t msgid_size = (size_t)(r->at - msgid);

    h = take_header(r);
    r->is_invalid |= !r->has_run_out && h.kind != TEXT;
    const uint8_t *method = take(r, h.bytes);
    bool is_echo = method && h.bytes == 4 && memcmp(method, "echo", 4) == 0;

    h = take_header(r);
    r->is_invalid |= !r->has_run_out && (h.kind != ARRAY || h.objects != 1);
    const uint8_t *param = r->at;
    skip(r);
    if (r->has_run_out || r->is_invalid)
        return to;

    to = put(to, "\x94\x01", 2);
    to = put(to, msgid, msgid_size);
    if (is_echo) {
        to = put(to, "\xc0", 1);
        return put(to, param, (size_t)(r->at - param));
    }
    *to++ = (uint8_t)(0xa0 | (sizeof no_such_method - 1));
    to = put(to, no_such_method, sizeof no_such_method - 1);
    return put(to, "\xc0", 1);
}

static void close_connection(struct connection *c)
{
    close(c->fd);
    free(c);
}

static void on_readable(struct connection *c)
{
    ssize_t n = recv(c->fd, c->in + c->in_size, ROOM - c->in_size, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        close_connection(c);
        return;
    }
    c->in_size += (size_t)n;

    struct reader r = {.at = c->in, .end = c->in + c->in_size};
    const uint8_t *done = r.at;
    uint8_t *to = out;
    while (done < r.end) {
        to = answer(&r, to);
        if (r.has_run_out || r.is_invalid)
            break;
        done = r.at;
    }
    if (r.is_invalid || (done == c->in && c->in_size == ROOM)) {
        close_connection(c);
        return;
    }
    c->in_size = (size_t)(r.end - done);
    memmove(c->in, done, c->in_size);

    /* This may block, but not for ever: the clients that are measured always read. */
    for (uint8_t *from = out; from < to; from += n) {
        n = send(c->fd, from, (size_t)(to - from), MSG_NOSIGNAL);
        if (n < 0) {
            close_connection(c);
            return;
        }
    }
}

int main(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t address_size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)
        || getsockname(listener, (struct sockaddr *)&address, &address_size))
        fail("listen");
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event))
        fail("epoll");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);

    for (;;) {
        struct epoll_event events[256];
        int n = epoll_wait(epoll, events, 256, -1);
        if (n < 0 && errno != EINTR)
            fail("epoll_wait");
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c) {
                on_readable(c);
                continue;
            }
            int fd = accept(listener, NULL, NULL), yes = 1;
            if (fd < 0)
                fail("accept");
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
            c = malloc(sizeof *c);
            if (!c)
                fail("malloc");
            c->fd = fd;
            c->in_size = 0;
            event.data.ptr = c;
            if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
                fail("epoll_ctl");
        }
    }
}
