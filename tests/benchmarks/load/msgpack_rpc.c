/* MessagePack-RPC: [0, msgid, method, [payload]] is answered by [1, msgid, nil, payload]. */
#include <arpa/inet.h>
#include <string.h>

#include "load.h"
#include "msgpack.h"

#define MSGID_AT 3 /* Four bytes, whatever the msgid. */

static uint8_t *template;
static size_t request_size;

/* What is behind the msgid of a right answer, in its shortest form. */
static uint8_t *right_end;
static size_t right_end_size;

static void prepare(void)
{
    template = allocate(payload_size + strlen(method) + 32);
    memcpy(template, "\x94\x00\xce\0\0\0\0", 7);
    request_size = 7;
    request_size += put_str(template + request_size, method, strlen(method));
    template[request_size++] = 0x91;
    request_size += put_str(template + request_size, payload, payload_size);

    right_end = allocate(payload_size + 32);
    right_end[0] = 0xc0;
    right_end_size = 1 + put_str(right_end + 1, payload, payload_size);
}

static void request(struct connection *c, uint32_t id)
{
    uint8_t *to = append(c, request_size);
    uint32_t msgid = htonl(id);
    memcpy(to, template, request_size);
    memcpy(to + MSGID_AT, &msgid, sizeof msgid);
}

/* The size of the message at p if it is the right answer to any call, else 0. It spares most answers the way through
 * `object_size`, which costs several times as much.
 */
static size_t size_if_right(const uint8_t *p, size_t n, int64_t *msgid)
{
    const uint8_t *message = p;
    if (n < 7 || p[0] != 0x94 || p[1] != 0x01)
        return 0;
    p += 2;
    *msgid = take_uint(&p);
    size_t size = (size_t)(p - message) + right_end_size;
    return *msgid >= 0 && n >= size && memcmp(p, right_end, right_end_size) == 0 ? size : 0;
}

static ssize_t take(struct connection *c, const uint8_t *p, size_t n)
{
    int64_t msgid = -1;
    size_t right_size = size_if_right(p, n, &msgid);
    if (right_size) {
        is_answered(c, (uint64_t)msgid, NULL, p, right_size);
        return (ssize_t)right_size;
    }

    ssize_t size = object_size(p, n);
    if (size < 0)
        complain("not MessagePack: ", p, n);
    if (size <= 0)
        return size;
    const uint8_t *message = p;
    if (*p++ != 0x94 || *p++ != 0x01 || (msgid = take_uint(&p)) < 0) {
        complain("not a response: ", message, (size_t)size);
        return size;
    }
    const char *fault = NULL;
    if (*p != 0xc0)
        fault = "error answer: ";
    else if (!is_text(p + 1, payload, payload_size))
        fault = "wrong result: ";
    is_answered(c, (uint64_t)msgid, fault, message, (size_t)size);
    return size;
}

const struct dialect msgpack_rpc = {"msgpack-rpc", prepare, is_ready, request, take};
