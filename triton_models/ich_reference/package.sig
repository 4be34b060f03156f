{
  "algorithm": "Ed25519",
  "key": "eb4b2c7a0c3a9597",
  "signature": "31ZsiL3N+quDjwRoX2QzYWz/oxraTxjosXsBWYW3svME0Yd3Gq9oYSIBA9VCjHcFxZHDj1yjqs3ZEg6Lf8SuBg=="
}
