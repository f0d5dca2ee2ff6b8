// bookkeeping of one layer: random operations against a map from row to position

#include "llama-kv-depth-cells.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

static void check_equal(const llama_kv_depth_cells & cells, const std::map<uint32_t, llama_pos> & ref) {
    llama_pos pos_min = -1;
    llama_pos pos_max = -1;

    for (const auto & [i, p] : ref) {
        CHECK(!cells.is_empty(i));
        CHECK(cells.pos_get(i) == p);

        pos_min = pos_min < 0 ? p : std::min(pos_min, p);
        pos_max = std::max(pos_max, p);
    }

    CHECK(cells.get_used()    == ref.size());
    CHECK(cells.used_max_p1() == (ref.empty() ? 0 : ref.rbegin()->first + 1));
    CHECK(cells.pos_min()     == pos_min);
    CHECK(cells.pos_max()     == pos_max);
}

static void test_random(uint32_t seed) {
    std::mt19937 rng(seed);

    const uint32_t n = 1 + rng()%100;

    llama_kv_depth_cells cells;
    cells.resize(n);

    std::map<uint32_t, llama_pos> ref;
    std::map<uint32_t, llama_pos> shift;

    llama_pos next = 0;

    for (int step = 0; step < 500; ++step) {
        switch (rng()%8) {
            default: // add, lowest empty row first
                {
                    if (ref.size() == n) {
                        break;
                    }
                    uint32_t row = 0;
                    while (ref.count(row)) {
                        row++;
                    }
                    CHECK(cells.add(next) == row);
                    CHECK(cells.acc[row] == 0.0f && cells.cnt[row] == 0.0f);
                    ref[row] = next++;
                    shift.erase(row);
                    cells.acc[row] = 1.0f;
                } break;
            case 5: // evict one
                {
                    if (ref.empty()) {
                        break;
                    }
                    auto it = std::next(ref.begin(), rng()%ref.size());
                    cells.rm(it->first);
                    shift.erase(it->first);
                    ref.erase(it);
                } break;
            case 6: // remove a range
                {
                    if (rng()%8 != 0) {
                        break;
                    }
                    const llama_pos p0 = rng()%(next + 1);
                    const llama_pos p1 = p0 + rng()%20;
                    cells.rm_range(p0, p1);
                    for (auto it = ref.begin(); it != ref.end(); ) {
                        if (it->second >= p0 && it->second < p1) {
                            shift.erase(it->first);
                            it = ref.erase(it);
                        } else {
                            ++it;
                        }
                    }
                } break;
            case 7: // shift a suffix to the left, what becomes negative goes
                {
                    if (rng()%8 != 0) {
                        break;
                    }
                    const llama_pos p0 = rng()%(next + 1);
                    const llama_pos d  = -(llama_pos) (rng()%10);
                    cells.add_range(p0, next, d);
                    for (auto it = ref.begin(); it != ref.end(); ) {
                        if (it->second >= p0 && it->second + d < 0) {
                            shift.erase(it->first);
                            it = ref.erase(it);
                        } else {
                            if (it->second >= p0) {
                                it->second       += d;
                                shift[it->first] += d;
                            }
                            ++it;
                        }
                    }
                } break;
        }

        check_equal(cells, ref);
        for (const auto & [i, d] : shift) {
            CHECK(cells.get_shift(i) == d);
        }
    }

    cells.reset_shift();
    CHECK(!cells.get_has_shift());

    cells.clear();
    check_equal(cells, {});
    CHECK(cells.n_evicted == 0);
}

static void test_div() {
    llama_kv_depth_cells cells;
    cells.resize(4);
    for (llama_pos p : { 0, 5, 8, 9 }) {
        cells.add(p);
    }
    cells.div_range(5, 9, 2);
    check_equal(cells, {{0, 0}, {1, 2}, {2, 4}, {3, 9}});
    CHECK(cells.get_shift(1) == -3 && cells.get_shift(2) == -4 && cells.get_shift(3) == 0);
}

static void test_pins() {
    llama_kv_depth_spans pins;
    CHECK(pins.empty() && !pins.has(0));

    pins.add(2, 10);
    pins.add(8, 12); // overlaps
    CHECK(!pins.has(1) && pins.has(2) && pins.has(11) && !pins.has(12));
    CHECK(pins.count(0) == 10);
    CHECK(pins.count(4) ==  8); // positions that are sinks anyway do not count

    pins.rm(4, 6);
    CHECK(pins.has(3) && !pins.has(4) && !pins.has(5) && pins.has(6));

    pins.shift(6, 100, -6);
    CHECK(pins.has(0) && pins.has(5) && !pins.has(6));
    CHECK(pins.count(0) == 6); // [2, 4) is part of [0, 6) now

    CHECK(pins.pos_min() == 0 && pins.pos_max() == 5);
    CHECK(pins.pos_before(0) == -1 && pins.pos_before(3) == 2 && pins.pos_before(100) == 5);

    pins.add(10, 20);
    pins.div(4, 100, 2); // 4, 5 and 10 to 19
    CHECK(pins.has(3) && !pins.has(4) && pins.has(5) && pins.has(9) && !pins.has(10));
    CHECK(pins.count(0) == 9); // 0 to 3 and 5 to 9

    pins.rm(0, 1000);
    CHECK(pins.empty());
}

int main() {
    for (uint32_t seed = 0; seed < 200; ++seed) {
        test_random(seed);
    }

    test_div();
    test_pins();

    printf("OK\n");

    return 0;
}
