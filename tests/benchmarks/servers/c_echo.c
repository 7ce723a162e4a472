/* What a server costs that does nothing: it takes whatever the load generator sends for calls of `echo`, all of one
 * size, and answers with bytes that were built once. It is here to show how fast the load generator is.
 *
 * Like every server in this directory it prints the port on which it listens.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* Of [0, msgid, "echo", [payload]]: the msgid's four bytes, and the payload as a str. An answer has the msgid in the
 * same place, and one byte, nil, in front of the payload.
 */
#define MSGID_AT 3
#define PAYLOAD_AT 13
#define RESULT_AT 8

struct connection {
    int fd;
    size_t request_size, answer_size; /* Known when the first request has begun. */
    uint8_t *in, *out;
    size_t in_size;
};

#define IN_ROOM (1024 * 1024)

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

/* The size of the str at p, with its header. */
static size_t str_size(const uint8_t *p)
{
    if ((*p & 0xe0) == 0xa0)
        return 1 + (*p & 0x1fu);
    int width = *p == 0xd9 ? 1 : *p == 0xda ? 2 : 4;
    size_t size = 0;
    for (int i = 1; i <= width; i++)
        size = size << 8 | p[i];
    return 1 + (size_t)width + size;
}

/* Build the answers to as many requests as the buffer for input can hold. */
static void learn(struct connection *c)
{
    size_t payload_size = str_size(c->in + PAYLOAD_AT);
    c->request_size = PAYLOAD_AT + payload_size;
    c->answer_size = RESULT_AT + payload_size;
    c->out = allocate(IN_ROOM / c->request_size * c->answer_size);
    for (size_t i = 0; i < IN_ROOM / c->request_size; i++) {
        uint8_t *answer = c->out + i * c->answer_size;
        memcpy(answer, "\x94\x01\xce\0\0\0\0\xc0", RESULT_AT);
        memcpy(answer + RESULT_AT, c->in + PAYLOAD_AT, payload_size);
    }
}

static void close_connection(struct connection *c)
{
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static void on_readable(struct connection *c)
{
    ssize_t n = recv(c->fd, c->in + c->in_size, IN_ROOM - c->in_size, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        close_connection(c);
        return;
    }
    c->in_size += (size_t)n;
    if (!c->request_size) {
        /* Wait for all of the first request. Its header is there: no kernel splits the first twenty bytes. */
        if (c->in_size < PAYLOAD_AT + 5 || c->in_size < PAYLOAD_AT + str_size(c->in + PAYLOAD_AT))
            return;
        learn(c);
    }

    size_t count = c->in_size / c->request_size;
    for (size_t i = 0; i < count; i++)
        memcpy(c->out + i * c->answer_size + MSGID_AT, c->in + i * c->request_size + MSGID_AT, 4);
    c->in_size -= count * c->request_size;
    memmove(c->in, c->in + count * c->request_size, c->in_size);

    /* This may block, but not for ever: the load generator always reads. */
    for (size_t sent = 0; sent < count * c->answer_size; sent += (size_t)n) {
        n = send(c->fd, c->out + sent, count * c->answer_size - sent, MSG_NOSIGNAL);
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
            c = allocate(sizeof *c);
            c->fd = fd;
            c->in = allocate(IN_ROOM);
            event.data.ptr = c;
            if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
                fail("epoll_ctl");
        }
    }
}
