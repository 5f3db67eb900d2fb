#include "shared_layout.hpp"

#include <algorithm>
#include <numeric>

#include "check.hpp"

namespace mgrpo {

namespace {

// Rows that are packed together.
struct Unit {
  std::vector<int32_t> items;
  int64_t tokens = 0;  // distinct
  double cost = 0;
  bool piece = false;  // of a tree that was cut
};

// Pieces of one tree that keep its root.
struct Held {
  int32_t tokens = 0;
  std::vector<Unit> pieces;
};

struct Units {
  std::vector<Unit> free;
  std::vector<Held> held;
};

// What some rows compute together behind a held prefix. Rows that end within it compute nothing and come last.
class Computed {
 public:
  Computed(const TokenRows<int32_t>& all, std::span<const int32_t> items, int32_t held, int64_t min_saved) {
    std::vector<const int32_t*> tokens;
    for (const int32_t i : items) {
      if (all.lengths[i] <= held) {
        ended_.push_back({i, all.lengths[i]});
        continue;
      }
      items_.push_back(i);
      tokens.push_back(all.tokens[i] + held);
      lengths_.push_back(all.lengths[i] - held);
    }
    tree_ = prefix_tree<int32_t>({tokens, lengths_}, min_saved);
    std::stable_sort(ended_.begin(), ended_.end(), [](const Row& a, const Row& b) { return a.shared > b.shared; });
    held_ = held;
  }

  const PrefixTree& tree() const { return tree_; }

  struct Row {
    int32_t item;
    int32_t shared;  // its leading tokens that the held prefix or an earlier row has
  };

  // In covering_order().
  std::vector<Row> rows() const {
    std::vector<Row> out;
    std::vector<bool> computed(tree_.size(), false);
    for (const int32_t r : covering_order(tree_, lengths_)) {
      int32_t shared = lengths_[r];
      for (int32_t n = tree_.leaf[r]; n >= 0 && !computed[n]; n = tree_.parent[n]) {
        computed[n] = true;
        shared = tree_.begin[n];
      }
      out.push_back({items_[r], held_ + shared});
    }
    out.insert(out.end(), ended_.begin(), ended_.end());
    return out;
  }

 private:
  std::vector<int32_t> items_, lengths_;
  std::vector<Row> ended_;
  int32_t held_;
  PrefixTree tree_;
};

// A token at depth p reads p + 1 keys: of a row of L tokens that is a*L + b*L^2, as everywhere.
double tree_cost(const PrefixTree& tree, int32_t from, int32_t to, const PackOptions& o, int32_t skip) {
  double cost = 0;
  for (int32_t n = from; n < to; ++n) {
    const double begin = skip + tree.begin[n], end = skip + tree.end[n];
    cost += o.cost_a * (end - begin) + o.cost_b * (end * end - begin * begin);
  }
  return cost;
}

// Cuts trees into pieces of at most `limit` tokens and max_rows rows, from the leaves to the root. A piece counts what
// leads to it. Behind the branch at which it is cut off it has at most `own` tokens, where it can be cut further: a
// bound on all of them would tear trees with long roots into single rows.
class Cutter {
 public:
  Cutter(const PrefixTree& tree, int64_t limit, int64_t own, int32_t max_rows)
      : tree_(tree), limit_(limit), own_(own), max_rows_(max_rows) {
    const size_t n = tree.size();
    ended_.resize(n + 1);
    for (const int32_t leaf : tree.leaf) ++ended_[leaf + 1];
    std::partial_sum(ended_.begin(), ended_.end(), ended_.begin());
    rows_.resize(tree.leaf.size());
    std::vector<int32_t> fill(ended_);
    for (size_t r = 0; r < rows_.size(); ++r) rows_[fill[tree.leaf[r]]++] = int32_t(r);
    below_.resize(n + 1);  // tokens of the nodes before each
    for (size_t i = 0; i < n; ++i) below_[i + 1] = below_[i] + tree.end[i] - tree.begin[i];
  }

  // Rows of one tree, whole or in pieces.
  std::vector<std::vector<int32_t>> cut(int32_t root) {
    std::vector<std::vector<Piece>> pieces(tree_.stop[root] - root);
    for (int32_t n = tree_.stop[root] - 1; n >= root; --n) {
      const int32_t parent = tree_.parent[n];
      if (fits(n)) {
        if (n == root || !fits(parent)) pieces[n - root].push_back({tokens(n), subtree(n)});
        continue;
      }
      std::vector<Piece> parts;
      for (int32_t c = n + 1; c < tree_.stop[n]; c = tree_.stop[c])
        std::move(pieces[c - root].begin(), pieces[c - root].end(), std::back_inserter(parts));
      for (int32_t i = ended_[n]; i < ended_[n + 1]; ++i) parts.push_back({0, {rows_[i]}});
      pieces[n - root] = together(std::move(parts), n);
    }
    std::vector<std::vector<int32_t>> out;
    for (Piece& piece : pieces[0]) {
      std::sort(piece.rows.begin(), piece.rows.end());
      out.push_back(std::move(piece.rows));
    }
    return out;
  }

  int64_t tokens(int32_t n) const { return below_[tree_.stop[n]] - below_[n]; }  // of its subtree

  std::vector<int32_t> subtree(int32_t n) const {
    return {rows_.begin() + ended_[n], rows_.begin() + ended_[tree_.stop[n]]};
  }

 private:
  struct Piece {
    int64_t tokens;  // from the begin of the node that is being cut
    std::vector<int32_t> rows;
  };

  bool fits(int32_t n) const {
    return tokens(n) <= std::min(own_, limit_ - tree_.begin[n]) && ended_[tree_.stop[n]] - ended_[n] <= max_rows_;
  }

  // Best fit decreasing of what hangs from node n.
  std::vector<Piece> together(std::vector<Piece> parts, int32_t n) const {
    std::stable_sort(parts.begin(), parts.end(), [](const Piece& a, const Piece& b) { return a.tokens > b.tokens; });
    const int64_t room = std::min(own_, limit_ - tree_.end[n]);
    std::vector<Piece> bins;
    for (Piece& part : parts) {
      Piece* best = nullptr;
      // Each bin has at least as many tokens. Without this, thousands of pieces that are as good as full would be held
      // against each other at every branch.
      if (2 * part.tokens > room) {
        bins.push_back(std::move(part));
        continue;
      }
      for (Piece& bin : bins)
        if (bin.tokens + part.tokens <= room && bin.rows.size() + part.rows.size() <= size_t(max_rows_) &&
            (!best || bin.tokens > best->tokens))
          best = &bin;
      if (best) {
        best->tokens += part.tokens;
        best->rows.insert(best->rows.end(), part.rows.begin(), part.rows.end());
      } else {
        bins.push_back(std::move(part));
      }
    }
    for (Piece& bin : bins) bin.tokens += tree_.end[n] - tree_.begin[n];
    return bins;
  }

  const PrefixTree& tree_;
  int64_t limit_, own_;
  int32_t max_rows_;
  std::vector<int32_t> ended_, rows_;  // rows_[ended_[n] .. ended_[n + 1]): those that end in node n
  std::vector<int64_t> below_;
};

class Planner {
 public:
  Planner(const TokenRows<int32_t>& entering, const PrefixTree& tree, const SharedOptions& o)
      : entering_(entering), tree_(tree), o_(o) {}

  // Pieces of at most `own` tokens behind what they share, where that can be.
  Units units(int64_t own) const {
    const int32_t max_rows = o_.pack.max_segments ? o_.pack.max_segments : int32_t(tree_.leaf.size());
    Cutter cutter(tree_, o_.pack.capacity, own, max_rows);
    Units out;
    for (int32_t root = 0; root < int32_t(tree_.size()); root = tree_.stop[root]) {
      std::vector<std::vector<int32_t>> pieces = cutter.cut(root);
      if (pieces.size() == 1) {
        const double cost = tree_cost(tree_, root, tree_.stop[root], o_.pack, 0);
        out.free.push_back({std::move(pieces[0]), cutter.tokens(root), cost, false});
      } else if (!o_.hold || !hold(out, pieces, root)) {
        for (const std::vector<int32_t>& rows : pieces) add(out.free, rows, 0, true);
      }
    }
    return out;
  }

 private:
  // A piece of fewer children than its tree may push nodes down that the tree had: what is above the capacity by that
  // is halved; both halves have rows that go on behind a held prefix.
  void add(std::vector<Unit>& to, const std::vector<int32_t>& rows, int32_t skip, bool piece) const {
    const Computed computed(entering_, rows, skip, o_.min_saved);
    const int64_t tokens = skip + computed.tree().tokens();
    if (tokens <= o_.pack.capacity) {
      const int32_t size = int32_t(computed.tree().size());
      to.push_back({rows, tokens, tree_cost(computed.tree(), 0, size, o_.pack, skip), piece});
      return;
    }
    std::vector<int32_t> ordered;
    for (const Computed::Row& row : computed.rows()) ordered.push_back(row.item);
    const auto middle = ordered.begin() + ptrdiff_t(computed.tree().leaf.size() / 2);
    std::sort(ordered.begin(), middle);
    std::sort(middle, ordered.end());
    add(to, {ordered.begin(), middle}, skip, true);
    add(to, {middle, ordered.end()}, skip, true);
  }

  // The first row of a held piece has all of the prefix: a piece of shorter ones alone is not held.
  bool hold(Units& out, const std::vector<std::vector<int32_t>>& pieces, int32_t root) const {
    Held held{tree_.end[root], {}};
    const auto further = [&](const std::vector<int32_t>& rows) {
      return std::any_of(rows.begin(), rows.end(), [&](int32_t r) { return entering_.lengths[r] > held.tokens; });
    };
    if (std::count_if(pieces.begin(), pieces.end(), further) < 2) return false;
    for (const std::vector<int32_t>& rows : pieces)
      further(rows) ? add(held.pieces, rows, held.tokens, true) : add(out.free, rows, 0, false);
    out.held.push_back(std::move(held));
    return true;
  }

  const TokenRows<int32_t>& entering_;
  const PrefixTree& tree_;
  const SharedOptions& o_;
};

// Each piece of a cut tree counts `slack` more tokens than it has.
Packing pack_units(const std::vector<Unit>& units, const SharedOptions& o, int64_t slack) {
  std::vector<int32_t> lengths, rows;
  std::vector<double> costs;
  for (const Unit& unit : units) {
    lengths.push_back(int32_t(std::min(o.pack.capacity, unit.tokens + (unit.piece ? slack : 0))));
    rows.push_back(int32_t(unit.items.size()));
    costs.push_back(unit.cost);
  }
  return pack({lengths, costs, rows}, o.pack);
}

// Appends one micro-batch; its distinct tokens.
int64_t write_rows(SharedLayout& out, std::vector<int32_t> items, int32_t prefix, int32_t id,
                   const TokenRows<int32_t>& entering, std::span<const int32_t> lengths, int64_t min_saved) {
  std::sort(items.begin(), items.end());
  const Computed computed(entering, items, prefix, min_saved);
  int32_t width = 0;
  for (const Computed::Row& row : computed.rows()) {
    out.padded.items.push_back(row.item);
    out.item_shared[row.item] = row.shared;
    out.shared_tokens += row.shared;
    width = std::max(width, lengths[row.item]);
  }
  out.padded.offsets.push_back(int32_t(out.padded.items.size()));
  out.padded.width.push_back(width);
  out.padded.prefix.push_back(prefix);
  out.padded.prefix_id.push_back(id);
  return prefix + computed.tree().tokens();
}

// Micro-batches of units that hold nothing. No value when one of them is above the capacity: where pieces meet, enough
// rows may have a node that none of them had alone; what is left of its children may then be too short to be nodes.
std::optional<SharedLayout> write_units(const std::vector<Unit>& units, int64_t slack,
                                        const TokenRows<int32_t>& entering, std::span<const int32_t> lengths,
                                        const SharedOptions& o) {
  const Packing packing = pack_units(units, o, slack);
  SharedLayout out;
  out.item_shared.resize(lengths.size());
  out.padded.offsets.push_back(0);
  out.padded.n_mb = packing.n_mb;
  for (size_t b = 0; b + 1 < packing.offsets.size(); ++b) {
    std::vector<int32_t> items;
    for (int32_t u = packing.offsets[b]; u < packing.offsets[b + 1]; ++u) {
      const std::vector<int32_t>& more = units[packing.items[u]].items;
      items.insert(items.end(), more.begin(), more.end());
    }
    const int64_t tokens = write_rows(out, std::move(items), 0, -1, entering, lengths, o.min_saved);
    if (tokens > o.pack.capacity && slack < o.pack.capacity) return std::nullopt;
  }
  return out;
}

}  // namespace

std::optional<SharedLayout> share_prefixes(const TokenRows<int32_t>& entering, std::span<const int32_t> lengths,
                                           const SharedOptions& o) {
  MGRPO_CHECK(!o.hold || o.pack.dp == 1, "hold_prefixes wants dp=1, this batcher has dp=", o.pack.dp);
  const PrefixTree tree = prefix_tree(entering, o.min_saved);
  const auto all = std::accumulate(entering.lengths.begin(), entering.lengths.end(), int64_t{0});
  if (tree.tokens() == all) return std::nullopt;
  const Planner planner(entering, tree, o);
  int64_t own = o.pack.capacity;
  Units units = planner.units(own);
  // Fewer trees than ranks would leave some idle.
  const size_t wanted = std::min(size_t(o.pack.dp), lengths.size());
  while (o.pack.dp > 1 && units.free.size() < wanted && own > 1) units = planner.units(own /= 2);
  // With a slack of the capacity each piece is alone, and trees that are whole count exactly what they have together.
  int64_t slack = o.min_saved;
  std::optional<SharedLayout> written = write_units(units.free, slack, entering, lengths, o);
  while (!written) written = write_units(units.free, slack *= 2, entering, lengths, o);
  SharedLayout& out = *written;
  for (size_t h = 0; h < units.held.size(); ++h) {
    const Held& held = units.held[h];
    for (const Unit& piece : held.pieces)
      write_rows(out, piece.items, held.tokens, int32_t(h), entering, lengths, o.min_saved);
    out.padded.n_mb += int(held.pieces.size());
    out.shared_tokens -= held.tokens;  // computed once
  }
  return written;
}

}  // namespace mgrpo
