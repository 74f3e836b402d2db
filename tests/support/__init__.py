"""What tests share: small models, toy defences, a Hub on the loopback interface, a stand-in device."""
