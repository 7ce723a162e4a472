/* As much of MessagePack as answers need that are compared and not used. */
#ifndef MSGPACK_H
#define MSGPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The size of the object that begins at p, of which n bytes are there: 0 if it isn't complete, -1 if it is invalid. */
ssize_t object_size(const uint8_t *p, size_t n);

/* The unsigned integer at *p, in any width up to four bytes, or -1; *p goes behind it. */
int64_t take_uint(const uint8_t **p);

/* The bytes of the str or bin at *p and their number, or NULL; *p goes behind them. */
const uint8_t *take_text(const uint8_t **p, size_t *size);

/* Whether the object at p is the str, or from a peer that doesn't tell the two apart the bin, of these bytes. */
bool is_text(const uint8_t *p, const void *text, size_t size);

/* Write a str; returns its size, which is up to five bytes more than the text's. */
size_t put_str(uint8_t *to, const void *text, size_t size);

#endif
