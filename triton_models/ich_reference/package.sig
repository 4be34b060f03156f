{
  "algorithm": "Ed25519",
  "key": "eb4b2c7a0c3a9597",
  "signature": "M9oDQ2HtHJ5IDh4sjiioy2zrozt28DKvlSD8UNmKNtE3NEGk5yaEZU6GlJP/+kCHQlwCPcvNR9eEMgHIlR19AA=="
}
