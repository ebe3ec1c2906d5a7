/* Where each base of a known sequence lies in its signal: the most likely path through a chain of levels, in which each
 * level lasts at least two samples. A level is two states, one after the other, so that its duration is a sum of two
 * geometric ones (negative binomial, shape 2), which is what peaks and valleys of real signal show. */
#include <math.h>
#include <stdlib.h>

/* Band of BAND states around a guess: state s may be visited at sample t when lowest[t] <= s < lowest[t] + BAND. */
enum { BAND = 96 };
static const float NEVER = -1e30f;

/* Signal x (n samples), levels (m of them), noise's standard deviation, logarithms of staying and stepping. Writes the first
 * sample of each level to `start`. Returns 0, or -1 when no path lies in the band, -2 when memory is out. */
int segment(const float *x, int n, const float *level, int m, float deviation, float stay, float step, const int *lowest,
            int *start) {
    float rows[2][BAND], *old = rows[0], *new = rows[1];
    unsigned char *stepped = calloc((size_t)n, BAND);
    if (!stepped) return -2;
    for (int t = 0; t < n; t++) {
        const int shift = t ? lowest[t] - lowest[t - 1] : 0;
        for (int i = 0; i < BAND; i++) {
            const int state = lowest[t] + i, j = i + shift;
            new[i] = NEVER;
            if (state < 0 || state >= 2 * m) continue;
            const float off = (x[t] - level[state / 2]) / deviation, emission = -0.5f * off * off;
            if (t == 0) {
                if (state == 0) new[i] = emission;
                continue;
            }
            const float stayed = j >= 0 && j < BAND ? old[j] + stay : NEVER;
            const float moved = j >= 1 && j <= BAND ? old[j - 1] + step : NEVER;
            stepped[(size_t)t * BAND + i] = moved > stayed;
            new[i] = (moved > stayed ? moved : stayed) + emission;
        }
        float *swap = old;
        old = new;
        new = swap;
    }
    int state = 2 * m - 1, failed = 0;
    for (int t = n - 1; t >= 0 && !failed; t--) {
        const int i = state - lowest[t];
        if (i < 0 || i >= BAND || (t == n - 1 && old[i] <= NEVER / 2)) {
            failed = -1;
        } else if (stepped[(size_t)t * BAND + i]) {
            if (state % 2 == 0) start[state / 2] = t;
            state--;
        }
    }
    start[0] = 0;
    free(stepped);
    return failed ? failed : state ? -1 : 0;
}
