#include "hpack.h"

#include <string.h>

#include "load.h"

/* Of the names in the static table, none of which is grpc-status (RFC 7541, appendix A). */
static const uint8_t static_name_sizes[] = {
    10, 7, 7, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 14, 15, 15, 13, 6, 27, 3, 5, 13, 13, 19, 16, 16, 14, 16, 13, 12,
    6, 4, 4, 6, 7, 4, 4, 8, 17, 13, 8, 19, 13, 4, 8, 12, 18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3, 16,
};
#define STATIC_ENTRIES ((int64_t)sizeof static_name_sizes)

void init_header_table(struct header_table *table)
{
    memset(table, 0, sizeof *table);
    table->max_size = HEADER_TABLE_SIZE;
}

/* An integer whose first byte has so many bits of it, or -1. */
static int64_t take_integer(const uint8_t **p, const uint8_t *end, int bits)
{
    if (*p == end)
        return -1;
    int64_t value = *(*p)++ & ((1 << bits) - 1);
    if (value < (1 << bits) - 1)
        return value;
    for (int shift = 0; shift < 28 && *p < end; shift += 7) {
        uint8_t byte = *(*p)++;
        value += (int64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return value;
    }
    return -1;
}

/* What is looked for, in plain and in Huffman's code. */
struct text {
    const char *plain, *code;
};
static const struct text grpc_status = {"grpc-status", "\x9a\xca\xc8\xb2\x12\x34\xda\x8f"}, zero = {"0", "\x07"};

/* A string: how many bytes it counts for, or in Huffman's code may count for, or -1; and whether it is this one. */
static int64_t take_string(const uint8_t **p, const uint8_t *end, const struct text *text, bool *is_it,
                           struct header_table *table)
{
    bool is_coded = *p < end && **p & 0x80;
    int64_t size = take_integer(p, end, 7);
    if (size < 0 || size > end - *p)
        return -1;
    const char *expected = is_coded ? text->code : text->plain;
    *is_it = (size_t)size == strlen(expected) && memcmp(*p, expected, (size_t)size) == 0;
    *p += size;
    if (!is_coded)
        return size;
    table->is_estimate = true;
    return size * 8 / 5; /* The shortest codes have five bits. */
}

size_t put_header_to_remember(uint8_t *to, const char *name, const char *value)
{
    size_t k = 0;
    to[k++] = 0x40;
    for (int i = 0; i < 2; i++) {
        const char *text = i ? value : name;
        size_t size = strlen(text);
        to[k++] = (uint8_t)MIN(size, 0x7f);
        if (size >= 0x7f) {
            size_t rest = size - 0x7f;
            for (; rest >= 0x80; rest >>= 7)
                to[k++] = (uint8_t)(0x80 | rest);
            to[k++] = (uint8_t)rest;
        }
        memcpy(to + k, text, size);
        k += size;
    }
    return k;
}

static void evict(struct header_table *table, uint32_t max_size)
{
    while (table->count && table->size > max_size) {
        table->count--;
        table->size -= table->entries[(table->newest - table->count) % HEADER_TABLE_ENTRIES].size;
    }
}

/* Whether what is in the table afterwards is known. */
static bool remember(struct header_table *table, struct header header)
{
    if (table->size + header.size > table->max_size) {
        if (table->is_estimate)
            return false;
        if (header.size > table->max_size) {
            evict(table, 0);
            return true;
        }
        evict(table, table->max_size - header.size);
    }
    table->newest++;
    table->entries[table->newest % HEADER_TABLE_ENTRIES] = header;
    table->count++;
    table->size += header.size;
    return true;
}

/* The header of an index, where 0 is none; false if there is no such index. */
static bool find(const struct header_table *table, int64_t index, struct header *header)
{
    *header = (struct header){.size = 0};
    if (index < 0 || index > STATIC_ENTRIES + (int64_t)table->count)
        return false;
    if (index && index <= STATIC_ENTRIES)
        header->name_size = static_name_sizes[index - 1];
    else if (index)
        *header = table->entries[(table->newest - (uint32_t)(index - STATIC_ENTRIES - 1)) % HEADER_TABLE_ENTRIES];
    return true;
}

enum grpc_status take_headers(struct header_table *table, const uint8_t *p, size_t n)
{
    enum grpc_status status = NO_STATUS;
    for (const uint8_t *end = p + n; p < end;) {
        struct header header;
        uint8_t kind = *p;
        if (kind & 0x80) { /* All of it is an index. */
            int64_t index = take_integer(&p, end, 7);
            if (index == 0 || !find(table, index, &header))
                return BAD_HEADERS;
        } else if ((kind & 0xe0) == 0x20) { /* The table's size changes. */
            int64_t size = take_integer(&p, end, 5);
            if (size < 0 || size > HEADER_TABLE_SIZE || (table->is_estimate && table->size > size))
                return BAD_HEADERS;
            table->max_size = (uint32_t)size;
            evict(table, table->max_size);
            continue;
        } else { /* The name may be an index; the header may be one to remember. */
            bool is_to_remember = kind & 0x40;
            int64_t index = take_integer(&p, end, is_to_remember ? 6 : 4);
            if (!find(table, index, &header))
                return BAD_HEADERS;
            int64_t name_size = header.name_size;
            if (index == 0)
                name_size = take_string(&p, end, &grpc_status, &header.is_status, table);
            int64_t value_size = take_string(&p, end, &zero, &header.is_zero, table);
            if (name_size < 0 || value_size < 0)
                return BAD_HEADERS;
            header.name_size = (uint32_t)name_size;
            header.size = (uint32_t)(name_size + value_size + 32);
            if (is_to_remember && !remember(table, header))
                return BAD_HEADERS;
        }
        if (header.is_status)
            status = header.is_zero ? STATUS_OK : STATUS_ERROR;
    }
    return status;
}
