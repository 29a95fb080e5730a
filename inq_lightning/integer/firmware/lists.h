/* Weights as lists: for each output and magnitude the inputs that are added and those that are subtracted. The fastest
 * layout.
 *
 * A list begins with how many there are of either kind, and goes on with their places in bytes. From the largest
 * magnitude down, sums are shifted to the left on the way to the next one. */

#ifndef INQ_WEIGHTS_H
#define INQ_WEIGHTS_H

#include "inq_lanes.h"

typedef uint16_t inq_code;

typedef struct {
    const inq_code *codes;
    const uint8_t *shifts; /* after each list */
    uint16_t inputs;       /* of one output */
    uint8_t lists;         /* of one output; a magnitude may have several */
} inq_weights_t;

/* Those of linear layers: places are bytes where no layer has more than 256 inputs; inq_network.c says so. */
#ifdef INQ_NARROW
typedef uint8_t inq_row_code;
#else
typedef uint16_t inq_row_code;
#endif

typedef struct {
    const inq_row_code *codes;
    const uint8_t *shifts;
    uint16_t inputs;
    uint8_t lists;
} inq_rows_t;

INQ_APART const inq_row_code *inq_dot1(const inq_rows_t *weights, const inq_row_code *list, const uint8_t *inputs,
                                       uint32_t *sum)
{
    const uint8_t *shift = weights->shifts, *end = shift + weights->lists;
    uint32_t total = 0;
    for (; shift != end; ++shift) {
        const inq_row_code *middle = list + 2 + list[0], *last = middle + list[1];
        for (list += 2; middle - list > 1; list += 2)
            total += (uint32_t)inputs[list[0]] + inputs[list[1]];
        if (list != middle)
            total += inputs[*list++];
        for (; last - list > 1; list += 2)
            total -= (uint32_t)inputs[list[0]] + inputs[list[1]];
        if (list != last)
            total -= inputs[*list++];
        total <<= *shift;
    }
    *sum = total;
    return list;
}

/* What four pixels take of one input, 16 bits apart already. */
typedef inq_pair inq_column;

static inline inq_column inq_column_of(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    inq_column column = {a | c << 16, b | d << 16};
    return column;
}

static inline void inq_add(inq_pair *lanes, const inq_column *columns, inq_code place)
{
    const inq_column *column = (const inq_column *)((const uint8_t *)columns + place);
    lanes->even += column->even;
    lanes->odd += column->odd;
}

static inline void inq_subtract(inq_pair *lanes, const inq_column *columns, inq_code place)
{
    const inq_column *column = (const inq_column *)((const uint8_t *)columns + place);
    lanes->even -= column->even;
    lanes->odd -= column->odd;
}

INQ_APART const inq_code *inq_dot4(const inq_weights_t *weights, const inq_code *list, const inq_column *columns,
                                       uint32_t *sums)
{
    const uint8_t *shift = weights->shifts, *end = shift + weights->lists;
    inq_pair lanes = {0, 0};
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
    for (; shift != end; ++shift) {
        uint32_t count = *list++, more = *list++;
        for (; count >= 4; count -= 4, list += 4) {
            inq_add(&lanes, columns, list[0]);
            inq_add(&lanes, columns, list[1]);
            inq_add(&lanes, columns, list[2]);
            inq_add(&lanes, columns, list[3]);
        }
        for (; count; --count)
            inq_add(&lanes, columns, *list++);
        for (count = more; count >= 4; count -= 4, list += 4) {
            inq_subtract(&lanes, columns, list[0]);
            inq_subtract(&lanes, columns, list[1]);
            inq_subtract(&lanes, columns, list[2]);
            inq_subtract(&lanes, columns, list[3]);
        }
        for (; count; --count)
            inq_subtract(&lanes, columns, *list++);
        if (*shift & INQ_TAKE) {
            inq_take(lanes, *shift & 31, sums);
            lanes.even = lanes.odd = 0;
        } else {
            lanes.even <<= *shift;
            lanes.odd <<= *shift;
        }
    }
    return list;
}

#endif
