/* The same network in int8, for comparison: takes the place of inq_weights.h. Weights are bytes, and products are made
 *
 * - by a multiplication in C, which is the hardware's, or else the compiler's routine; or,
 * - with INQ_SOFTWARE, by eight steps of shifts and additions of one's own, for the four pixels of a tile at once,
 *   which end at the weight's last bit.
 */

#ifndef INQ_WEIGHTS_H
#define INQ_WEIGHTS_H

#include "inq_lanes.h"

typedef int8_t inq_code;

typedef struct {
    const inq_code *codes;
    const uint8_t *shifts; /* none */
    uint16_t inputs;       /* of one output */
} inq_weights_t;

typedef inq_code inq_row_code;
typedef inq_weights_t inq_rows_t;
typedef uint32_t inq_column;

static inline inq_column inq_column_of(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    return a | b << 8 | c << 16 | d << 24;
}

#ifdef INQ_SOFTWARE
INQ_APART const inq_code *inq_dot1(const inq_weights_t *weights, const inq_code *codes, const uint8_t *inputs,
                                   uint32_t *sum)
{
    const inq_code *end = codes + weights->inputs;
    uint32_t total = 0;
    while (codes != end) {
        int32_t weight = *codes++;
        uint32_t bits = (uint32_t)(weight < 0 ? -weight : weight), x = *inputs++, product = 0;
        for (; bits; bits >>= 1, x <<= 1)
            if (bits & 1)
                product += x;
        total += weight < 0 ? 0 - product : product;
    }
    *sum = total;
    return end;
}

INQ_APART const inq_code *inq_dot4(const inq_weights_t *weights, const inq_code *codes, const inq_column *columns,
                                   uint32_t *sums)
{
    const inq_code *end = codes + weights->inputs;
    uint32_t a = 0, b = 0, c = 0, d = 0;
    while (codes != end) {
        int32_t weight = *codes++;
        uint32_t bits = (uint32_t)(weight < 0 ? -weight : weight), column = *columns++;
        uint32_t even = column & 0x00ff00ff, odd = column >> 8 & 0x00ff00ff, low = 0, high = 0;
        for (; bits; bits >>= 1, even <<= 1, odd <<= 1) /* 255 * 128 fits 16 bits, so two pixels share a word */
            if (bits & 1) {
                low += even;
                high += odd;
            }
        if (weight < 0) {
            a -= low & 0xffff;
            b -= high & 0xffff;
            c -= low >> 16;
            d -= high >> 16;
        } else {
            a += low & 0xffff;
            b += high & 0xffff;
            c += low >> 16;
            d += high >> 16;
        }
    }
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
    return end;
}
#else
INQ_APART const inq_code *inq_dot1(const inq_weights_t *weights, const inq_code *codes, const uint8_t *inputs,
                                   uint32_t *sum)
{
    const inq_code *end = codes + weights->inputs;
    int32_t total = 0;
    while (codes != end)
        total += *codes++ * *inputs++;
    *sum = (uint32_t)total;
    return end;
}

INQ_APART const inq_code *inq_dot4(const inq_weights_t *weights, const inq_code *codes, const inq_column *columns,
                                   uint32_t *sums)
{
    const inq_code *end = codes + weights->inputs;
    const uint8_t *pixels = (const uint8_t *)columns;
    int32_t a = 0, b = 0, c = 0, d = 0;
    for (; codes != end; pixels += 4) {
        int32_t weight = *codes++;
        a += weight * pixels[0];
        b += weight * pixels[1];
        c += weight * pixels[2];
        d += weight * pixels[3];
    }
    sums[0] = (uint32_t)a;
    sums[1] = (uint32_t)b;
    sums[2] = (uint32_t)c;
    sums[3] = (uint32_t)d;
    return end;
}
#endif

#endif
