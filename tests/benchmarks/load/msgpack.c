#include "msgpack.h"

#include <string.h>

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

ssize_t object_size(const uint8_t *p, size_t n)
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

int64_t take_uint(const uint8_t **p)
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

const uint8_t *take_text(const uint8_t **p, size_t *size)
{
    uint8_t type = *(*p)++;
    if ((type & 0xe0) == 0xa0) {
        *size = type & 0x1f;
    } else if ((type >= 0xd9 && type <= 0xdb) || (type >= 0xc4 && type <= 0xc6)) {
        size_t width = layouts[type - 0xc0].length_width;
        *size = big_endian(*p, width);
        *p += width;
    } else {
        return NULL;
    }
    const uint8_t *text = *p;
    *p += *size;
    return text;
}

bool is_text(const uint8_t *p, const void *text, size_t size)
{
    size_t found_size;
    const uint8_t *found = take_text(&p, &found_size);
    return found && found_size == size && memcmp(found, text, size) == 0;
}

size_t put_str(uint8_t *to, const void *text, size_t size)
{
    uint8_t *p = to;
    int width = size < 32 ? 0 : size < 0x100 ? 1 : size < 0x10000 ? 2 : 4;
    *p++ = (uint8_t)(width == 0 ? 0xa0 | size : 0xd9 + (unsigned)width / 2);
    while (width--)
        *p++ = (uint8_t)(size >> 8 * width);
    memcpy(p, text, size);
    return (size_t)(p - to) + size;
}
