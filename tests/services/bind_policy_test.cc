// Loopback unless told otherwise: which addresses need TLS, which --insecure, which are refused.

#include "services/common/bind_policy.h"

#include <string>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace moebius::services {
namespace {

ListenOptions Options(const std::string& address, bool tls, bool insecure) {
  ListenOptions options;
  options.address = address;
  options.insecure = insecure;
  if (tls) options.tls_cert = options.tls_key = options.tls_ca = "some.pem";
  return options;
}

TEST(BindPolicyTest, LoopbackNeedsNothing) {
  for (const char* address :
       {"127.0.0.1:0", "127.9.8.7:50051", "localhost:1", "[::1]:2", "unix:/x"}) {
    EXPECT_TRUE(CheckBindPolicy(Options(address, false, false)).ok()) << address;
  }
}

TEST(BindPolicyTest, ElsewhereNeedsTlsOrInsecure) {
  for (const char* address : {"10.0.0.1:0", "0.0.0.0:1", "[::]:1", "127.example.org:1",
                              "127.0.0.1.example.org:1", "", ":80"}) {
    EXPECT_EQ(CheckBindPolicy(Options(address, false, false)).code(),
              absl::StatusCode::kFailedPrecondition)
        << address;
    EXPECT_TRUE(CheckBindPolicy(Options(address, true, false)).ok()) << address;
    EXPECT_TRUE(CheckBindPolicy(Options(address, false, true)).ok()) << address;
  }
}

TEST(BindPolicyTest, TlsFilesGoTogetherAlsoOnLoopback) {
  ListenOptions options = Options("127.0.0.1:0", false, true);
  options.tls_cert = "some.pem";
  EXPECT_EQ(CheckBindPolicy(options).code(), absl::StatusCode::kInvalidArgument);
}

TEST(BindPolicyTest, TlsOfGrpcDoesNotCoverTheDataPlane) {
  const std::string data = "10.0.0.1:0";
  for (const bool tls : {false, true}) {
    const absl::Status status = CheckWorkerBindPolicy(Options("127.0.0.1:0", tls, false), data);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_TRUE(absl::StrContains(status.message(), "--data-address 10.0.0.1:0")) << status;
    EXPECT_TRUE(CheckWorkerBindPolicy(Options("127.0.0.1:0", tls, true), data).ok());
    EXPECT_TRUE(CheckWorkerBindPolicy(Options("127.0.0.1:0", tls, false), "127.0.0.1:0").ok());
  }
  EXPECT_EQ(CheckWorkerBindPolicy(Options("10.0.0.1:0", false, false), "127.0.0.1:0").code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(BindPolicyTest, WorkersDoNotRegisterUnspecifiedAddresses) {
  const absl::Status data = CheckWorkerBindPolicy(Options("127.0.0.1:0", false, true), "0.0.0.0:0");
  EXPECT_EQ(data.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(data.message(), "--data-address 0.0.0.0:0")) << data;
  for (const char* listen : {"0.0.0.0:5", "[::]:5"}) {
    const absl::Status status = CheckWorkerBindPolicy(Options(listen, false, true), "127.0.0.1:0");
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_TRUE(absl::StrContains(status.message(), "--listen")) << status;
  }
}

}  // namespace
}  // namespace moebius::services
