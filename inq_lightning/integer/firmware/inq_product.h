/* Convolutions and linear layers, on bytes.
 *
 * inq_weights.h brings inq_dot1, the sum of one output of a linear layer, and inq_dot4, that of one output channel at
 * a tile of 2 x 2 pixels: what four pixels take is gathered into one column of words, one byte a pixel, so that each
 * weight is looked at once for all four, and one addition serves two pixels, 16 bits each. */

#ifndef INQ_PRODUCT_H
#define INQ_PRODUCT_H

#include "inq_kernels.h"
#include "inq_weights.h"

/* Bytes of one number of x; where it is the same for all layers, inq_network.c says it. */
#ifndef INQ_PLANES
#define INQ_PLANES op->planes
#endif

typedef struct {
    inq_rows_t weights;
    inq_scaling scaling;
    uint16_t outputs;
    uint8_t planes;   /* bytes of one number of x; the values of all first bytes come first */
} inq_linear_t;

static inline void inq_linear(const inq_linear_t *op, const uint8_t *x, const inq_value *y)
{
    inq_channel channel = inq_first(&op->scaling);
    const inq_row_code *codes = op->weights.codes;
    uint_fast16_t output;
    for (output = 0; output != op->outputs; ++output) {
        const inq_row_code *next = codes;
        const uint8_t *plane = x;
        uint32_t sum = 0;
        uint_fast8_t p, shift = 0;
        for (p = 0; p != INQ_PLANES; ++p, shift += 8, plane += op->weights.inputs) {
            uint32_t part;
            next = inq_dot1(&op->weights, codes, plane, &part);
            sum += part << shift;
        }
        codes = next;
        inq_put(y, output, inq_finish(&op->scaling, &channel, sum));
        inq_next(&op->scaling, &channel);
    }
}

typedef struct {
    inq_weights_t weights;
    inq_scaling scaling;
    uint16_t groups, outputs, channels; /* the last two of one group */
    uint16_t height, width;
    uint16_t rows, columns; /* of the result, before it is pooled */
    uint16_t kernel[2], stride[2], dilation[2];
    uint16_t padding[2];
    uint8_t pooled;      /* of each tile only the maximum is kept */
    uint8_t planes;      /* bytes of one number of x */
    uint8_t zeros[4];    /* what stands for 0 in each of them */
    uint32_t plane;      /* height · width */
    uint32_t group;      /* channels · height · width */
    uint32_t all;        /* groups · channels · height · width */
    uint32_t result;     /* numbers of one channel of the result */
    uint32_t tiles;      /* numbers of one channel that one row of tiles makes */
    uint32_t first;      /* place of the first tap, modulo 2^32: -padding[0] · width */
    uint32_t row_stride; /* stride[0] · width */
    uint32_t row_step;   /* dilation[0] · width */
} inq_convolution_t;

/* Where all convolutions are alike in something, inq_network.c says it as a number, and the compiler leaves out the
 * rest; a convolution's own else. */
#ifndef INQ_KERNEL
#define INQ_KERNEL(axis) op->kernel[axis]
#endif
#ifndef INQ_STRIDE
#define INQ_STRIDE(axis) op->stride[axis]
#endif
#ifndef INQ_DILATION
#define INQ_DILATION(axis) op->dilation[axis]
#endif
#ifndef INQ_PADDING
#define INQ_PADDING(axis) op->padding[axis]
#endif
#ifndef INQ_GROUPS
#define INQ_GROUPS op->groups
#endif
#ifndef INQ_POOLED
#define INQ_POOLED op->pooled
#endif
/* What the four pixels of a tile take: tap by tap, in each tap channel by channel. Rows and columns before the first
 * are large numbers here, modulo 2^32.
 *
 * top, left: of the first pixel's first tap. line: place of the row's first number. zero: what lies outside. */
static inline void inq_gather(const inq_convolution_t *op, const uint8_t *x, const uint8_t *zero, uint32_t top,
                              uint32_t left, uint32_t line, inq_column *columns)
{
    uint_fast16_t ky, kx, c;
    for (ky = 0; ky != INQ_KERNEL(0); ++ky, top += INQ_DILATION(0), line += op->row_step) {
        uint32_t across = left;
        for (kx = 0; kx != INQ_KERNEL(1); ++kx, across += INQ_DILATION(1)) {
            const uint8_t *from[4];
            uint32_t steps[4];
            uint_fast8_t p;
            for (p = 0; p != 4; ++p) {
                uint32_t down = top, right = across, start = line;
                if (p & 2) {
                    down += INQ_STRIDE(0);
                    start += op->row_stride;
                }
                if (p & 1)
                    right += INQ_STRIDE(1);
                from[p] = zero;
                steps[p] = 0;
                if (down < op->height && right < op->width) {
                    from[p] = x + (uint32_t)(start + right);
                    steps[p] = op->plane;
                }
            }
            for (c = 0; c != op->channels; ++c) {
                *columns++ = inq_column_of(*from[0], *from[1], *from[2], *from[3]);
                from[0] += steps[0];
                from[1] += steps[1];
                from[2] += steps[2];
                from[3] += steps[3];
            }
        }
    }
}

/* columns: room for planes · weights.inputs. */
static inline void inq_convolution(const inq_convolution_t *op, const uint8_t *x, const inq_value *y,
                                   inq_column *columns)
{
    inq_channel first = inq_first(&op->scaling);
    const inq_code *codes = op->weights.codes;
    uint32_t to = 0; /* place of the group's first result */
    uint_fast16_t g, row, column, output;
    for (g = 0; g != INQ_GROUPS; ++g, x += op->group) {
        const inq_code *next = codes;
        inq_channel channel = first;
        uint32_t top = 0 - (uint32_t)INQ_PADDING(0), line = op->first, start = 0, end = to;
        for (row = 0; row < op->rows; row += 2) {
            uint32_t left = 0 - (uint32_t)INQ_PADDING(1);
            for (column = 0; column < op->columns; column += 2) {
                const uint8_t *plane = x;
                inq_column *words = columns;
                uint32_t pixel = start + (INQ_POOLED ? column >> 1 : column), place = to + pixel;
                uint_fast8_t p;
                for (p = 0; p != INQ_PLANES; ++p, plane += op->all, words += op->weights.inputs)
                    inq_gather(op, plane, op->zeros + p, top, left, line, words);
                next = codes;
                channel = first;
                for (output = 0; output != op->outputs; ++output, place += op->result) {
                    const inq_code *here = next;
                    uint32_t sums[4], more[4];
                    int32_t largest = 0;
                    uint_fast8_t shift = 0;
                    words = columns;
                    next = inq_dot4(&op->weights, here, words, sums);
                    for (p = 1; p != INQ_PLANES; ++p) {
                        words += op->weights.inputs;
                        shift += 8;
                        inq_dot4(&op->weights, here, words, more);
                        sums[0] += more[0] << shift;
                        sums[1] += more[1] << shift;
                        sums[2] += more[2] << shift;
                        sums[3] += more[3] << shift;
                    }
                    for (p = 0; p != 4; ++p) {
                        uint_fast16_t down = p >> 1, right = p & 1;
                        int32_t number = inq_finish(&op->scaling, &channel, sums[p]);
                        if (p == 0 || number > largest)
                            largest = number;
                        if (!INQ_POOLED && row + down < op->rows && column + right < op->columns)
                            inq_put(y, place + (down ? op->columns : 0) + right, number);
                    }
                    if (INQ_POOLED)
                        inq_put(y, place, largest);
                    inq_next(&op->scaling, &channel);
                }
                end = place - pixel;
                left += INQ_STRIDE(1);
                left += INQ_STRIDE(1);
            }
            start += op->tiles;
            top += INQ_STRIDE(0);
            top += INQ_STRIDE(0);
            line += op->row_stride;
            line += op->row_stride;
        }
        codes = next;
        first = channel;
        to = end;
    }
}

#endif
