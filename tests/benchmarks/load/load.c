/* A closed-loop load generator for any server that has a method `echo`, in one of several protocols.
 *
 *     load --dialect msgpack-rpc --port 4423 --connections 50 --in-flight 16 --payload-bytes 12 --warmup 0.5 --seconds 2
 *
 * Every connection keeps the same number of calls in flight: an answer is followed at once by the next request, so the
 * server is never idle and never asked for more than it can do. Every answer is checked: it has to be that of a call
 * which is outstanding on its connection, with the payload as its result. What was found is printed as JSON; the exit
 * status is 0 whenever something could be measured, however the server did.
 *
 * One thread with epoll and one clock reading per wake-up, so that it takes little from a server on the same core.
 */
#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "latencies.h"

/* When neither an answer has come for so long, nor a connection become ready, what is missing won't come any more. */
#define PATIENCE_NS 3000000000ull

static const struct dialect *const dialects[] = {&msgpack_rpc, &zerorpc, &rpyc, &grpc};

/* One of the calls that a connection has in flight. Its id modulo their number is its index. */
struct call {
    uint32_t id;
    bool is_outstanding;
    uint64_t sent_ns;
};

struct connection {
    int fd;
    bool is_ready, is_closed, is_waiting_to_write, was_answered;
    struct call *calls;
    uint8_t *in;
    size_t in_size, in_room;
    uint8_t *out; /* From out_sent to out_size it has to be sent yet. */
    size_t out_sent, out_size, out_room;
    void *state;
};

const char *method = "echo";
uint8_t *payload;
size_t payload_size = 12;
unsigned calls_in_flight = 1;

static const struct dialect *dialect = &msgpack_rpc;
static int port, connection_count = 1;
static double warmup = 0.5, seconds = 2;

static int epoll;
static bool is_holding, is_measuring, is_stopping;
static uint64_t now; /* When the wake-up began that is dealt with. */
static int unready; /* Connections that nothing can be asked of yet. */
static uint64_t outstanding, answered, errors, lost_connections;
static char first_error[300]; /* Fit for JSON as it stands. */

static void fail(const char *what)
{
    perror(what);
    exit(2);
}

void *allocate(size_t size)
{
    void *memory = calloc(1, size);
    if (!memory)
        fail("calloc");
    return memory;
}

static uint8_t *enlarge(uint8_t *memory, size_t *room, size_t needed)
{
    while (*room < needed)
        *room = *room * 2 + 1024;
    memory = realloc(memory, *room);
    if (!memory)
        fail("realloc");
    return memory;
}

static uint64_t clock_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ull + (uint64_t)time.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec)
        + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

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

void complain(const char *what, const uint8_t *bytes, size_t size)
{
    errors++;
    note_error(what, bytes, size);
}

/* ---- Calls ---- */

void **state_of(struct connection *c)
{
    return &c->state;
}

void is_ready(struct connection *c)
{
    c->is_ready = true;
    unready--;
}

uint8_t *append(struct connection *c, size_t size)
{
    if (c->out_size + size > c->out_room && c->out_sent) {
        c->out_size -= c->out_sent;
        memmove(c->out, c->out + c->out_sent, c->out_size);
        c->out_sent = 0;
    }
    if (c->out_size + size > c->out_room)
        c->out = enlarge(c->out, &c->out_room, c->out_size + size);
    c->out_size += size;
    return c->out + c->out_size - size;
}

static void start_call(struct connection *c, struct call *call)
{
    call->is_outstanding = true;
    call->sent_ns = now;
    outstanding++;
    dialect->request(c, call->id);
}

void is_answered(struct connection *c, uint64_t id, const char *fault, const uint8_t *message, size_t size)
{
    struct call *call = &c->calls[id % calls_in_flight];
    if (call->id != id || !call->is_outstanding) {
        complain("id that is not outstanding: ", message, size);
        return;
    }
    call->is_outstanding = false;
    outstanding--;
    answered++;
    c->was_answered = true;
    if (fault)
        complain(fault, message, size);
    else if (is_measuring)
        add_latency(now - call->sent_ns);
    if (!is_stopping) {
        call->id += calls_in_flight; /* It would take hours of one run to wrap. */
        start_call(c, call);
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

    c->calls = allocate(calls_in_flight * sizeof *c->calls);
    for (unsigned i = 0; i < calls_in_flight; i++)
        c->calls[i].id = i;
    c->in_room = payload_size + 64 * 1024;
    c->in = allocate(c->in_room);
}

static void lose_connection(struct connection *c, const char *why)
{
    note_error("connection lost: ", why, strlen(why));
    close(c->fd);
    c->is_closed = true;
    lost_connections++;
    if (!c->is_ready)
        unready--;
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

static void on_readable(struct connection *c)
{
    if (c->in_size == c->in_room) /* One message fills it all; it can't be the right one. */
        c->in = enlarge(c->in, &c->in_room, c->in_room + 1);
    /* Only once: what is left over makes the descriptor readable again. */
    ssize_t n = recv(c->fd, c->in + c->in_size, c->in_room - c->in_size, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        lose_connection(c, n ? strerror(errno) : "closed by the server");
        return;
    }
    c->in_size += (size_t)n;

    now = clock_ns();
    size_t done = 0;
    ssize_t size;
    while (done < c->in_size && (size = dialect->take(c, c->in + done, c->in_size - done))) {
        if (size < 0) {
            lose_connection(c, "out of step");
            return;
        }
        done += (size_t)size;
    }
    c->in_size -= done;
    if (done)
        memmove(c->in, c->in + done, c->in_size);
    /* The requests that these answers made room for leave together, as a client with work to do would send them. */
    if (!c->is_waiting_to_write)
        flush_out(c);
}

/* ---- The run ---- */

static const struct dialect *dialect_named(const char *name)
{
    size_t count = sizeof dialects / sizeof *dialects;
    for (size_t i = 0; i < count; i++)
        if (strcmp(dialects[i]->name, name) == 0)
            return dialects[i];
    fprintf(stderr, "load: --dialect is one of");
    for (size_t i = 0; i < count; i++)
        fprintf(stderr, "%s %s", i ? "," : "", dialects[i]->name);
    fprintf(stderr, "\n");
    exit(2);
}

static void parse_options(int argc, char **argv)
{
    static const struct option options[] = {
        {"dialect", required_argument, NULL, 'd'},       {"method", required_argument, NULL, 'm'},
        {"port", required_argument, NULL, 'p'},          {"connections", required_argument, NULL, 'c'},
        {"in-flight", required_argument, NULL, 'i'},     {"payload-bytes", required_argument, NULL, 'b'},
        {"warmup", required_argument, NULL, 'w'},        {"seconds", required_argument, NULL, 's'},
        {"hold", no_argument, NULL, 'h'},                {NULL, 0, NULL, 0},
    };
    int in_flight = 1;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 'd': dialect = dialect_named(optarg); break;
        case 'm': method = optarg; break;
        case 'p': port = atoi(optarg); break;
        case 'c': connection_count = atoi(optarg); break;
        case 'i': in_flight = atoi(optarg); break;
        case 'b': payload_size = strtoul(optarg, NULL, 10); break;
        case 'w': warmup = atof(optarg); break;
        case 's': seconds = atof(optarg); break;
        case 'h': is_holding = true; break;
        default: exit(2);
        }
    }
    if (port < 1 || connection_count < 1 || in_flight < 1 || optind < argc) {
        fprintf(stderr, "usage: load [--dialect NAME] [--method NAME] --port P [--connections C] [--in-flight N] "
                        "[--payload-bytes B] [--warmup S] [--seconds S] | --hold\n");
        exit(2);
    }
    calls_in_flight = (unsigned)in_flight;
}

static void build_payload(void)
{
    payload = allocate(payload_size + 1);
    for (size_t i = 0; i < payload_size; i++)
        payload[i] = (uint8_t)('a' + i % 26);
}

/* Deal with everything that happens until something has, or for a while. */
static void serve_connections(void)
{
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
    now = clock_ns();
}

/* Wait until calls can begin; what is never ready stays behind. */
static void get_ready(struct connection *connections)
{
    dialect->prepare();
    unready = connection_count;
    for (int i = 0; i < connection_count; i++) {
        open_connection(&connections[i]);
        dialect->greet(&connections[i]);
        flush_out(&connections[i]);
    }
    now = clock_ns();
    uint64_t last_ready_ns = now;
    for (int unready_before = unready; unready && now - last_ready_ns < PATIENCE_NS;) {
        serve_connections();
        if (unready != unready_before) {
            unready_before = unready;
            last_ready_ns = now;
        }
    }
    if (unready)
        note_error("connections that never got ready", "", 0);
}

/* ---- Idle connections ---- */

static void give_up(const char *what, int number)
{
    fprintf(stderr, "connection %d of %d %s; %s\n", number, connection_count, what, first_error);
    exit(1);
}

/* Open the connections one after the other, so that no queue of those that wait to be accepted is too short; each makes
 * a call. Then say so, and hold them, quiet, until standard input ends.
 */
static void hold(struct connection *connections)
{
    dialect->prepare();
    is_stopping = true; /* A call is followed by none. */
    for (int i = 0; i < connection_count; i++) {
        struct connection *c = &connections[i];
        open_connection(c);
        unready++;
        dialect->greet(c);
        flush_out(c);
        uint64_t last_ns = now = clock_ns();
        while (!c->is_ready && !c->is_closed && now - last_ns < PATIENCE_NS)
            serve_connections();
        if (!c->is_ready || c->is_closed)
            give_up("never got ready", i + 1);
        start_call(c, c->calls);
        flush_out(c);
        while (outstanding && !c->is_closed && now - last_ns < PATIENCE_NS)
            serve_connections();
        if (outstanding || errors)
            give_up("got no right answer", i + 1);
    }
    printf("{\"held\": %d}\n", connection_count);
    fflush(stdout);
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    do
        serve_connections(); /* Once at least: what has been closed by now is lost, however soon the end comes. */
    while (poll(&input, 1, 0) == 0);
    if (lost_connections) {
        fprintf(stderr, "%llu of %d idle connections lost\n", (unsigned long long)lost_connections, connection_count);
        exit(1);
    }
    exit(0);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    build_payload();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        fail("epoll_create1");
    struct connection *connections = allocate((size_t)connection_count * sizeof *connections);
    if (is_holding)
        hold(connections);
    get_ready(connections);

    now = clock_ns();
    uint64_t warm_ns = now + (uint64_t)(warmup * 1e9);
    uint64_t begin_ns = 0, end_ns = 0, last_answer_ns = now, answered_before = 0, answered_at_begin = 0;
    double cpu_begin = 0, cpu_end = 0;
    for (int i = 0; i < connection_count; i++) {
        struct connection *c = &connections[i];
        if (c->is_closed || !c->is_ready)
            continue;
        for (unsigned k = 0; k < calls_in_flight; k++)
            start_call(c, &c->calls[k]);
        flush_out(c);
    }

    /* Warm up, measure, then let what is in flight come home. */
    while (outstanding && lost_connections < (uint64_t)connection_count && now - last_answer_ns < PATIENCE_NS) {
        serve_connections();
        if (answered != answered_before) {
            answered_before = answered;
            last_answer_ns = now;
        }
        if (!begin_ns && now >= warm_ns) {
            is_measuring = true;
            begin_ns = now;
            answered_at_begin = answered;
            cpu_begin = cpu_seconds();
        } else if (is_measuring && now >= begin_ns + (uint64_t)(seconds * 1e9) && answered != answered_at_begin) {
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
    printf("{\"seconds\": %.6f, \"calls\": %llu, \"answered\": %llu, \"calls_per_second\": %.1f, "
           "\"p50_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f, \"max_us\": %.2f, "
           "\"errors\": %llu, \"unanswered\": %llu, \"lost_connections\": %llu, \"silent_connections\": %d, "
           "\"is_complete\": %s, \"generator_cpu\": %.3f, \"first_error\": \"%s\"}\n",
        elapsed, (unsigned long long)latency_count(), (unsigned long long)answered,
        elapsed > 0 ? (double)latency_count() / elapsed : 0,
        percentile_us(50), percentile_us(99), percentile_us(99.9), max_latency_us(),
        (unsigned long long)errors, (unsigned long long)outstanding, (unsigned long long)lost_connections,
        silent_connections, is_stopping ? "true" : "false", elapsed > 0 ? (cpu_end - cpu_begin) / elapsed : 0,
        first_error);
    return 0;
}
