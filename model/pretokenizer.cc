#include "model/pretokenizer.h"

#include <algorithm>

#define PCRE2_CODE_UNIT_WIDTH 8
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "base/unique_handle.h"
#include "model/utf8.h"
#include "pcre2.h"

namespace moebius::model {
namespace {

struct CodeTraits {
  using Type = pcre2_code*;
  static constexpr Type kInvalid = nullptr;
  static void Close(Type code) { pcre2_code_free(code); }
};
struct MatchDataTraits {
  using Type = pcre2_match_data*;
  static constexpr Type kInvalid = nullptr;
  static void Close(Type data) { pcre2_match_data_free(data); }
};
struct MatchContextTraits {
  using Type = pcre2_match_context*;
  static constexpr Type kInvalid = nullptr;
  static void Close(Type context) { pcre2_match_context_free(context); }
};
using MatchData = UniqueHandle<MatchDataTraits>;
using MatchContext = UniqueHandle<MatchContextTraits>;

// Unicode White_Space. PCRE2's own \s under UCP also takes U+180E.
constexpr char kWhiteSpace[] =
    R"(\x{9}-\x{D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

constexpr size_t kMaxExpressionBytes = 16 << 10;

absl::Status Refused(absl::string_view expression, absl::string_view problem) {
  return absl::UnimplementedError(
      absl::StrCat("expression ", expression.substr(0, 200), ": ", problem));
}

std::string ErrorText(int code) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

absl::StatusOr<std::string> TranslateExpression(absl::string_view expression) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < expression.size(); ++i) {
    const char c = expression[i];
    if (c == '\\') {
      if (++i == expression.size()) return Refused(expression, "ends with a backslash");
      const char escaped = expression[i];
      if (escaped == 's') {
        absl::StrAppend(&out, in_class ? "" : "[", kWhiteSpace, in_class ? "" : "]");
      } else if (escaped == 'S') {
        if (in_class) return Refused(expression, "\\S within a character class");
        absl::StrAppend(&out, "[^", kWhiteSpace, "]");
      } else if (absl::string_view("pPrnt").find(escaped) != absl::string_view::npos ||
                 !((escaped >= 'a' && escaped <= 'z') || (escaped >= 'A' && escaped <= 'Z') ||
                   (escaped >= '0' && escaped <= '9'))) {
        // Properties, line ends, tab and escaped punctuation are the same in both engines.
        out.push_back('\\');
        out.push_back(escaped);
      } else {
        return Refused(expression,
                       absl::StrCat("\\", absl::string_view(&escaped, 1), " is not supported"));
      }
    } else if (in_class) {
      if (c == '[' || (c == '&' && i + 1 < expression.size() && expression[i + 1] == '&')) {
        return Refused(expression, "set operations within a character class");
      }
      if (c == ']') in_class = false;
      out.push_back(c);
    } else {
      if (c == '[') {
        in_class = true;
        out.push_back(c);
        if (i + 1 < expression.size() && expression[i + 1] == '^') {
          out.push_back('^');
          ++i;
        }
        if (i + 1 < expression.size() && expression[i + 1] == ']') {
          return Refused(expression, "an empty character class");
        }
        continue;
      }
      // Anchors, the dot and inline options depend on each engine's notion of a line and of case.
      if (c == '^' || c == '$' || c == '.') {
        return Refused(expression, absl::StrCat(absl::string_view(&c, 1), " is not supported"));
      }
      if (c == '(' && i + 1 < expression.size() && expression[i + 1] == '?' &&
          (i + 2 == expression.size() ||
           absl::string_view(":=!").find(expression[i + 2]) == absl::string_view::npos)) {
        return Refused(expression, "only the groups (?: (?= (?! are supported");
      }
      if (c == '(' && i + 1 < expression.size() && expression[i + 1] == '*') {
        return Refused(expression, "(* is not supported");
      }
      if (c == '}' && i + 1 < expression.size() && expression[i + 1] == '+') {
        return Refused(expression, "{...}+ is possessive in one engine only");
      }
      out.push_back(c);
    }
  }
  return out;
}

class PreTokenizer::Expression {
 public:
  static absl::StatusOr<std::unique_ptr<Expression>> Compile(const std::string& expression) {
    if (expression.size() > kMaxExpressionBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("expression of ", expression.size(), " bytes"));
    }
    ASSIGN_OR_RETURN(const std::string translated, TranslateExpression(expression));
    int error = 0;
    PCRE2_SIZE error_offset = 0;
    auto compiled = std::make_unique<Expression>();
    compiled->code_.reset(pcre2_compile(
        reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
        PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &error_offset, nullptr));
    if (!compiled->code_) {
      return absl::InvalidArgumentError(
          absl::StrCat("expression ", expression.substr(0, 200), ": ", ErrorText(error)));
    }
    uint32_t matches_empty = 0;
    pcre2_pattern_info(compiled->code_.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
    if (matches_empty != 0) return Refused(expression, "can match the empty string");
    // Only speed depends on it: where no executable memory is to be had, the interpreter runs.
    pcre2_jit_compile(compiled->code_.get(), PCRE2_JIT_COMPLETE);
    compiled->text_ = expression;
    return compiled;
  }

  // REQUIRES: `text` is valid UTF-8.
  absl::Status Split(absl::string_view text, pcre2_match_data* data, pcre2_match_context* context,
                     std::vector<absl::string_view>& pieces) const {
    size_t done = 0;
    while (done < text.size()) {
      // The text was checked once; PCRE2 would check the rest of it again for every match.
      int result = Match(text, done, PCRE2_NO_UTF_CHECK, data, context);
      if (result == PCRE2_ERROR_JIT_STACKLIMIT) {
        result = Match(text, done, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, context);
      }
      if (result == PCRE2_ERROR_NOMATCH) break;
      if (result < 0) {
        return absl::ResourceExhaustedError(
            absl::StrCat("expression ", text_.substr(0, 200), ": ", ErrorText(result)));
      }
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data);
      // A lookahead cannot move a match's start behind its end, \K could; it is refused above.
      if (span[1] <= span[0] || span[0] < done) {
        return absl::InternalError("a match is empty or out of order");
      }
      if (span[0] > done) pieces.push_back(text.substr(done, span[0] - done));
      pieces.push_back(text.substr(span[0], span[1] - span[0]));
      done = span[1];
    }
    if (done < text.size()) pieces.push_back(text.substr(done));
    return absl::OkStatus();
  }

 private:
  int Match(absl::string_view text, size_t from, uint32_t options, pcre2_match_data* data,
            pcre2_match_context* context) const {
    return pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                       options, data, context);
  }

  UniqueHandle<CodeTraits> code_;
  std::string text_;
};

PreTokenizer::~PreTokenizer() = default;
PreTokenizer::PreTokenizer(PreTokenizer&&) noexcept = default;
PreTokenizer& PreTokenizer::operator=(PreTokenizer&&) noexcept = default;

absl::StatusOr<PreTokenizer> PreTokenizer::Create(const std::vector<std::string>& expressions) {
  PreTokenizer pre_tokenizer;
  for (const std::string& expression : expressions) {
    ASSIGN_OR_RETURN(std::unique_ptr<Expression> compiled, Expression::Compile(expression));
    pre_tokenizer.expressions_.push_back(std::move(compiled));
  }
  return pre_tokenizer;
}

absl::Status PreTokenizer::Split(absl::string_view text,
                                 std::vector<absl::string_view>& pieces) const {
  const MatchData data(pcre2_match_data_create(1, nullptr));
  const MatchContext context(pcre2_match_context_create(nullptr));
  if (!data || !context) return absl::ResourceExhaustedError("no memory for a match");
  // A run of n spaces is walked back once, so the limit has to grow with the text.
  constexpr size_t kSteps = 10'000'000;
  pcre2_set_match_limit(context.get(), static_cast<uint32_t>(std::min<size_t>(
                                           kSteps + 16 * text.size(), 0xFFFF'FFFF)));
  std::vector<absl::string_view> current, next;
  while (!text.empty()) {
    if (const size_t invalid = InvalidUtf8Prefix(text); invalid > 0) {
      pieces.push_back(text.substr(0, invalid));
      text.remove_prefix(invalid);
      continue;
    }
    const size_t valid = ValidUtf8Prefix(text);
    current.assign(1, text.substr(0, valid));
    for (const auto& expression : expressions_) {
      next.clear();
      for (const absl::string_view piece : current) {
        RETURN_IF_ERROR(expression->Split(piece, data.get(), context.get(), next));
      }
      current.swap(next);
    }
    pieces.insert(pieces.end(), current.begin(), current.end());
    text.remove_prefix(valid);
  }
  return absl::OkStatus();
}

}  // namespace moebius::model
