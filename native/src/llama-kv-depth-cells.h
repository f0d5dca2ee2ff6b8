#pragma once

#include "llama.h"

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <limits>
#include <vector>

// which position sits in which row of one layer, for one sequence
//
// unlike llama_kv_cells a cell belongs to one sequence only, so a position is all there is to know about it. with one
// instance per layer the bookkeeping has to stay small: 12 bytes per cell against the ~140 of llama_kv_cells
class llama_kv_depth_cells {
public:
    void resize(uint32_t n) {
        pos.assign(n, -1);
        acc.assign(n, 0.0f);
        cnt.assign(n, 0.0f);
        shift.clear();

        n_used = 0;
        n_rows = 0;
        head   = 0;
        p_max  = -1;

        pos_scored  = -1;
        is_scored   = false;
        n_evicted   = 0;
        pos_evicted = -1;
        pos_missing = none;
    }

    void clear() {
        resize(pos.size());
    }

    uint32_t size() const {
        return pos.size();
    }

    uint32_t get_used() const {
        return n_used;
    }

    // the index of the last cell that is used + 1
    uint32_t used_max_p1() const {
        return n_rows;
    }

    bool is_empty(uint32_t i) const {
        return pos[i] < 0;
    }

    llama_pos pos_get(uint32_t i) const {
        return pos[i];
    }

    // [size()], -1 for an empty cell
    const llama_pos * pos_data() const {
        return pos.data();
    }

    llama_pos pos_min() const {
        llama_pos res = -1;
        for (uint32_t i = 0; i < n_rows && res != 0; ++i) {
            if (pos[i] >= 0 && (res < 0 || pos[i] < res)) {
                res = pos[i];
            }
        }
        return res;
    }

    llama_pos pos_max() const {
        return p_max;
    }

    // place a position in the lowest empty cell, returns its row
    // low rows first: the rows that attention reads are [0, used_max_p1())
    uint32_t add(llama_pos p) {
        assert(p >= 0);
        assert(n_used < pos.size());

        while (pos[head] >= 0) {
            head++;
        }

        set(head, p);

        return head++;
    }

    // place a position in a given empty cell
    void set(uint32_t i, llama_pos p) {
        assert(pos[i] < 0 && p >= 0);

        pos[i] = p;
        acc[i] = 0.0f;
        cnt[i] = 0.0f;
        if (!shift.empty()) {
            shift[i] = 0;
        }

        n_used++;
        n_rows = std::max(n_rows, i + 1);
        p_max  = std::max(p_max, p);
    }

    void rm(uint32_t i) {
        const llama_pos p = pos[i];
        assert(p >= 0);

        pos[i] = -1;
        if (!shift.empty()) {
            shift[i] = 0;
        }

        n_used--;
        head = std::min(head, i);

        while (n_rows > 0 && pos[n_rows - 1] < 0) {
            n_rows--;
        }

        if (p == p_max) {
            update_max();
        }
    }

    // free a cell while p_last is the last position of the sequence
    void evict(uint32_t i, llama_pos p_last) {
        pos_evicted = p_last;
        pos_missing = std::min(pos_missing, pos[i]);

        n_evicted++;

        rm(i);
    }

    // what is left when the positions from p0 on are removed is what the layer held when p0 was the next one, or all there is
    bool can_rm_from(llama_pos p0) const {
        return p0 > pos_evicted || p0 <= pos_missing;
    }

    // remove the positions in [p0, p1), to the end of the sequence if p1 is none
    void rm_range(llama_pos p0, llama_pos p1) {
        if (p1 == none && p0 <= pos_missing && n_evicted > 0) {
            // nothing is missing any more. scores that what is removed has given are not those of a fresh evaluation
            std::fill(acc.begin(), acc.end(), 0.0f);
            std::fill(cnt.begin(), cnt.end(), 0.0f);

            is_scored   = false;
            n_evicted   = 0;
            pos_evicted = -1;
            pos_missing = none;
        } else {
            // what was evicted behind the range is not known, and to go back into it is to go back to its end
            pos_evicted = pos_evicted >= p0 && pos_evicted < p1 ? p1 : pos_evicted;
            pos_missing = pos_missing >= p0 && pos_missing < p1 ? p1 : pos_missing;
        }

        // front ends remove what is not there before every step, in every layer
        if (p0 > p_max) {
            return;
        }

        // no need to look for the last position after each of them
        p_max = none;

        for (uint32_t i = n_rows; i-- > 0; ) {
            if (pos[i] >= p0 && pos[i] < p1) {
                rm(i);
            }
        }

        update_max();

        pos_scored = std::min(pos_scored, p_max);
        is_scored  = is_scored && n_used > 0;
    }

    // pos = pos + d for the positions in [p0, p1), cells that become negative are removed
    void add_range(llama_pos p0, llama_pos p1, llama_pos d) {
        for (uint32_t i = n_rows; i-- > 0; ) {
            if (pos[i] >= p0 && pos[i] < p1) {
                move(i, pos[i] + d);
            }
        }

        update_max();

        const auto moved = [&](llama_pos p) {
            return p >= p0 && p < p1 ? std::max(0, p + d) : p;
        };

        // what is behind the range may come first now
        pos_missing = pos_missing < p1 ? std::min(moved(pos_missing), p1) : pos_missing;
        pos_evicted = moved(pos_evicted);
        pos_scored  = std::min(moved(pos_scored), p_max);
    }

    // pos = pos / d for the positions in [p0, p1)
    void div_range(llama_pos p0, llama_pos p1, int d) {
        for (uint32_t i = n_rows; i-- > 0; ) {
            if (pos[i] >= p0 && pos[i] < p1) {
                move(i, pos[i] / d);
            }
        }

        update_max();

        const auto moved = [&](llama_pos p) {
            return p >= p0 && p < p1 ? p / d : p;
        };

        pos_missing = moved(pos_missing);
        pos_evicted = moved(pos_evicted);
        pos_scored  = std::min(moved(pos_scored), p_max);
    }

    // rotary shift that the stored keys still lack, empty: none of them
    bool get_has_shift() const {
        return !shift.empty();
    }

    llama_pos get_shift(uint32_t i) const {
        return shift.empty() ? 0 : shift[i];
    }

    void set_shift(uint32_t i, llama_pos d) {
        if (shift.empty()) {
            shift.assign(pos.size(), 0);
        }
        shift[i] = d;
    }

    void reset_shift() {
        shift.clear();
    }

    // state of the token-scoring rule, see llama-kv-score.h
    // acc, cnt: [size()], what a scorer accumulates for each cell, zero for a new token
    std::vector<float> acc;
    std::vector<float> cnt;

    // the last position whose query has been counted, -1: none
    llama_pos pos_scored = -1;

    // some cell has been judged
    bool is_scored = false;

    // eviction since the layer last held every token of the sequence: cells freed, the last position of the sequence at the
    // time of the last one (-1: there was none), and the first position that may be missing
    uint64_t  n_evicted   = 0;
    llama_pos pos_evicted = -1;
    llama_pos pos_missing = none;

    // a position behind all others
    static constexpr llama_pos none = std::numeric_limits<llama_pos>::max();

private:
    std::vector<llama_pos> pos;
    std::vector<llama_pos> shift;

    uint32_t n_used = 0;
    uint32_t n_rows = 0;

    // no cell before this one is empty
    uint32_t head = 0;

    llama_pos p_max = -1;

    void update_max() {
        p_max = -1;
        for (uint32_t i = 0; i < n_rows; ++i) {
            p_max = std::max(p_max, pos[i]);
        }
    }

    void move(uint32_t i, llama_pos p) {
        if (p < 0) {
            rm(i);
            return;
        }

        set_shift(i, get_shift(i) + p - pos[i]);
        pos[i] = p;
    }
};

// a set of positions of one sequence, as disjoint spans
class llama_kv_depth_spans {
public:
    void clear() {
        spans.clear();
    }

    bool empty() const {
        return spans.empty();
    }

    // -1 if empty
    llama_pos pos_min() const {
        llama_pos res = -1;
        for (const auto & s : spans) {
            res = res < 0 ? s.first : std::min(res, s.first);
        }
        return res;
    }

    llama_pos pos_max() const {
        llama_pos res = -1;
        for (const auto & s : spans) {
            res = std::max(res, s.second - 1);
        }
        return res;
    }

    // the last one before p, -1: there is none
    llama_pos pos_before(llama_pos p) const {
        llama_pos res = -1;
        for (const auto & s : spans) {
            if (s.first < p) {
                res = std::max(res, std::min(s.second, p) - 1);
            }
        }
        return res;
    }

    bool has(llama_pos p) const {
        for (const auto & s : spans) {
            if (p >= s.first && p < s.second) {
                return true;
            }
        }
        return false;
    }

    // number of positions from p on
    uint32_t count(llama_pos p) const {
        uint32_t res = 0;
        for (const auto & s : spans) {
            const llama_pos p0 = std::max(s.first, p);
            res += s.second > p0 ? s.second - p0 : 0;
        }
        return res;
    }

    void add(llama_pos p0, llama_pos p1) {
        if (p1 <= p0) {
            return;
        }
        // a sequence grows at its end
        if (!spans.empty() && spans.back().second == p0 && spans.back().second > pos_max()) {
            spans.back().second = p1;
            return;
        }
        // no position counts twice
        rm(p0, p1);
        spans.emplace_back(p0, p1);
    }

    void rm(llama_pos p0, llama_pos p1) {
        if (p1 <= p0) {
            return;
        }
        std::vector<std::pair<llama_pos, llama_pos>> res;
        for (const auto & s : spans) {
            if (s.first < std::min(s.second, p0)) {
                res.emplace_back(s.first, std::min(s.second, p0));
            }
            if (std::max(s.first, p1) < s.second) {
                res.emplace_back(std::max(s.first, p1), s.second);
            }
        }
        spans = std::move(res);
    }

    // move the positions in [p0, p1) by d, those that become negative are removed
    void shift(llama_pos p0, llama_pos p1, llama_pos d) {
        std::vector<std::pair<llama_pos, llama_pos>> moved;
        for (const auto & s : spans) {
            const llama_pos m0 = std::max(s.first,  p0);
            const llama_pos m1 = std::min(s.second, p1);
            // a span may reach to the largest position there is
            const int64_t n0 = std::max<int64_t>((int64_t) m0 + d, 0);
            const int64_t n1 = std::min<int64_t>((int64_t) m1 + d, std::numeric_limits<llama_pos>::max());

            if (m0 < m1 && n0 < n1) {
                moved.emplace_back(n0, n1);
            }
        }
        rm(p0, p1);
        for (const auto & s : moved) {
            add(s.first, s.second);
        }
    }

    // divide the positions in [p0, p1) by d
    void div(llama_pos p0, llama_pos p1, int d) {
        std::vector<std::pair<llama_pos, llama_pos>> divided;
        for (const auto & s : spans) {
            const llama_pos m0 = std::max(s.first,  p0);
            const llama_pos m1 = std::min(s.second, p1);

            if (m0 < m1) {
                divided.emplace_back(m0/d, (m1 - 1)/d + 1);
            }
        }
        rm(p0, p1);
        for (const auto & s : divided) {
            add(s.first, s.second);
        }
    }

    // [p0, p1)
    std::vector<std::pair<llama_pos, llama_pos>> spans;
};
